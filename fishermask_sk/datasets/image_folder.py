"""A folder of images as a pool that is read file by file.

Knows files and PIL; torchvision is imported only where an image is made a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

# What torchvision reads too.
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
)


class ImageFolderPool(Dataset[tuple[Tensor, int]]):
    """The images in a folder and below, read and resized one by one when they are
    needed.

    JPEG, PNG and what else torchvision reads, grey or colour, of any sizes. The
    camera's rotation is applied, 16 bits are scaled to 8, what is transparent lies on
    white. Files are sorted by name, hidden ones left out.

    Parameters
    ----------
    folder : str or Path
        Flat, or with subfolders of any depth.
    size : int, default=224
        Side of the square images. At 224 they are as torchvision's pretrained weights
        ask: the shorter side becomes 256, the middle 224 are taken. At any other size
        the shorter side becomes `size`, and the middle square is taken. Both are
        normalised by ImageNet's mean and standard deviation.
    transform : callable, optional
        Instead of that: from a PIL image in RGB to a tensor of shape (3, height,
        width), the same for every image.

    Attributes
    ----------
    root : Path
    names : list of str
        The files, relative to `root`, with slashes on every system.

    Raises
    ------
    FileNotFoundError
        Where there is no such folder.
    ValueError
        Where it holds no images, or `size` is no positive int; and when an image is
        read that cannot be.

    Notes
    -----
    An item is a pair of the image, a float32 tensor of shape (3, size, size), and 0,
    which stands where skorch looks for a label. ``iterator_valid__num_workers=4`` of a
    net reads with four processes.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from fishermask_sk.datasets import ImageFolderPool
    >>> folder = Path(tempfile.mkdtemp())
    >>> Image.new("L", (40, 30)).save(folder / "a.png")
    >>> (folder / "cats").mkdir()
    >>> Image.new("RGB", (50, 90)).save(folder / "cats" / "b.jpg")
    >>> pool = ImageFolderPool(folder, size=32)
    >>> pool.names, pool[0][0].shape
    (['a.png', 'cats/b.jpg'], torch.Size([3, 32, 32]))
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        size: int = 224,
        transform: Callable[[Image.Image], Tensor] | None = None,
    ) -> None:
        self.root, self.size, self.transform = (
            Path(folder).expanduser(),
            size,
            transform,
        )
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"There is no folder {self.root}; pass the one that holds the images."
            )
        if (
            not isinstance(size, (int, np.integer))
            or isinstance(size, bool)
            or size < 1
        ):
            raise ValueError(f"size={size!r} must be an int >= 1, a side in pixels.")
        paths = (path.relative_to(self.root) for path in self.root.rglob("*"))
        self.names = sorted(
            path.as_posix()
            for path in paths
            if path.suffix.lower() in EXTENSIONS
            and not any(part.startswith(".") for part in path.parts)
            and (self.root / path).is_file()
        )
        if not self.names:
            raise ValueError(
                f"{self.root} holds no images; expected files that end in "
                f"{', '.join(sorted(EXTENSIONS))}."
            )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self._to_tensor(self.picture(i)), 0

    @cached_property
    def _to_tensor(self) -> Callable[[Image.Image], Tensor]:
        if self.transform is not None:
            return self.transform
        from torchvision.models import ResNet18_Weights

        resized = 256 if self.size == 224 else self.size
        preset = ResNet18_Weights.DEFAULT.transforms
        return preset(crop_size=self.size, resize_size=resized)

    def picture(self, i: int) -> Image.Image:
        """Read an image as it is in its file, upright and in RGB.

        Parameters
        ----------
        i : int

        Returns
        -------
        PIL.Image.Image

        Raises
        ------
        ValueError
            Where the file is no readable image.
        """
        try:
            with Image.open(self.root / self.names[i]) as image:
                return _in_rgb(ImageOps.exif_transpose(image))
        except (
            UnidentifiedImageError,
            Image.DecompressionBombError,
            OSError,
            SyntaxError,
        ) as error:
            raise ValueError(
                f"{self.root / self.names[i]} is no readable image ({error}); remove "
                "or replace it. unreadable() of the pool lists all such files."
            ) from error

    def unreadable(self) -> list[str]:
        """Read every file once, and return the names of those that are no images."""
        broken = []
        for i, name in enumerate(self.names):
            try:
                self.picture(i)
            except ValueError:
                broken.append(name)
        return broken

    def folder_labels(self) -> np.ndarray:
        """Labels by the name of the first subfolder, as ``cats/b.jpg`` has "cats".

        Returns
        -------
        ndarray of shape (n_samples,)

        Raises
        ------
        ValueError
            Where an image lies in no subfolder.
        """
        loose = [name for name in self.names if "/" not in name]
        if loose:
            raise ValueError(
                f"{loose[0]!r} and {len(loose) - 1} more lie in {self.root} itself; "
                "expected a subfolder per class, <class>/<file>."
            )
        return np.array([name.split("/")[0] for name in self.names])


def _in_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image in RGB."""
    if image.mode.startswith("I"):  # PIL would clip 16 bits at 255
        pixels = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
