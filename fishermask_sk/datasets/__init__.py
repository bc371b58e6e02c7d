"""Images: data sets as arrays, folders as pools, and labelling a folder by hand.

Sees files and pictures, never a net. Imports nothing of the package but warnings.
Offers `load_images`, `ImageFolderPool` and `LabelingSession`; `image_folder` is
a folder of yours, `image_files` reads published data sets, `label_studio` has the
formats of Label Studio.
"""

from fishermask_sk.datasets.image_folder import ImageFolderPool
from fishermask_sk.datasets.images import load_images
from fishermask_sk.datasets.labeling import LabelingSession

__all__ = ["ImageFolderPool", "LabelingSession", "load_images"]
