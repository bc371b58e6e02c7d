"""What a learner takes for images and labels; everything else is refused in one
sentence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import numpy as np
import torch
from scipy import sparse
from skorch.helper import SliceDataset
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate
from tqdm.auto import tqdm

_EXPECTED = (
    "expected images (n_samples, channels, height, width), "
    "or (n_samples, height, width) for one channel"
)


def as_images(X: Any) -> Any:
    """Return X as an array, tensor or lazy sequence whose rows torch can read.

    Raises
    ------
    TypeError
        Where X is sparse, or a DataLoader.
    ValueError
        Where a list holds images of different shapes.
    """
    if isinstance(X, DataLoader):
        raise TypeError(
            "X is a DataLoader, and batches are made here; pass its Dataset, "
            "loader.dataset."
        )
    if sparse.issparse(X):
        raise TypeError(
            f"X is a sparse matrix of shape {X.shape}; {_EXPECTED}: pass a dense array "
            "of them."
        )
    if isinstance(X, torch.Tensor):
        return X
    if isinstance(X, SliceDataset):
        pairs = as_pairs(X.dataset)
        return X if pairs is X.dataset else SliceDataset(pairs, X.idx, X.indices)
    try:
        X = np.asarray(X)
    except ValueError as error:
        shapes = sorted({np.shape(image) for image in X})
        raise ValueError(
            f"X holds images of different shapes, {', '.join(map(str, shapes[:3]))}; "
            f"{_EXPECTED}: resize them to one shape."
        ) from error
    if not X.dtype.isnative or any(stride < 0 for stride in X.strides):
        X = np.ascontiguousarray(X, dtype=X.dtype.newbyteorder("="))
    return X


def as_pairs(dataset: Dataset[Any]) -> Dataset[Any]:
    """Return a Dataset of (image, label), whatever the items are.

    Parameters
    ----------
    dataset : Dataset
        Of pairs, which are left as they are; of bare images, which get the label None;
        of longer tuples, whose first two entries are taken; or of (image,).

    Raises
    ------
    TypeError
        Where it has no length, or is read in its own order only.
    """
    if not hasattr(dataset, "__len__") or isinstance(dataset, IterableDataset):
        fault = (
            "in its own order only"
            if hasattr(dataset, "__len__")
            else "of unknown length"
        )
        raise TypeError(
            f"X is the {type(dataset).__name__} {fault}; pass a Dataset with __len__ "
            "and __getitem__, or arrays."
        )
    if len(dataset) == 0 or _is_pair(dataset[0]):
        return dataset
    return _Pairs(dataset)


class _Pairs(Dataset[Any]):
    """The items of a Dataset as pairs (image, label)."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        item = self.dataset[index]
        if not isinstance(item, (tuple, list)):
            return item, None
        return item[0], item[1] if len(item) > 1 else None


def _is_pair(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and len(item) == 2


def labels_of(dataset: Dataset[Any], verbose: int = 0) -> np.ndarray:
    """Return the labels of a Dataset of pairs; every item is read once.

    Raises
    ------
    ValueError
        Where the first item has none.
    """
    pairs = as_pairs(dataset)
    if len(pairs) and pairs[0][1] is None:  # type: ignore[arg-type]
        raise ValueError(
            f"y is None, and the {type(dataset).__name__} holds images without labels; "
            "pass a label for each image as y."
        )
    positions = range(len(pairs))  # type: ignore[arg-type]
    steps = slow_steps(positions, "labels of a Dataset", bool(verbose))
    return np.array([pairs[i][1] for i in steps])


def collate(items: list[Any]) -> Any:
    """Make a batch of pairs: images as torch stacks them, and labels of any kind.

    Returns
    -------
    images : tensor
    labels : tensor, or ndarray of strings
        Zeros where there are none.

    Raises
    ------
    ValueError
        Where images differ in shape.
    """
    if not all(map(_is_pair, items)):
        return default_collate(items)
    images, labels = map(list, zip(*items, strict=True))
    shapes = sorted({tuple(np.shape(image)) for image in images})
    if len(shapes) > 1:
        raise ValueError(
            f"X holds images of different shapes, {', '.join(map(str, shapes[:3]))}; "
            "resize them to one shape in the Dataset."
        )
    if labels[0] is None:
        return default_collate(images), torch.zeros(len(images), dtype=torch.int64)
    if isinstance(labels[0], str):
        return default_collate(images), np.array(labels)
    return default_collate(images), default_collate(labels)


def check_images(
    X: Any, fitted_shape: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """Return channels, height and width of images, once they are found sound.

    Parameters
    ----------
    X : array, tensor or SliceDataset
        What `as_images` returned; of a SliceDataset only the first image is looked at.

    fitted_shape : tuple of int or None
        The shape that the images must have.

    Raises
    ------
    ValueError
        Where there is none, or shape, dtype or values are not those of images.
    """
    if len(X) == 0:
        raise ValueError(f"X holds no samples; {_EXPECTED}: pass at least one.")
    sample = X if hasattr(X, "dtype") else X[0]
    if not hasattr(sample, "dtype"):
        raise ValueError(
            f"X holds {type(sample).__name__} objects; {_EXPECTED}: convert them to "
            "arrays or tensors."
        )
    shape = tuple(X.shape) if sample is X else (len(X), *sample.shape)
    if len(shape) not in (3, 4) or 0 in shape:
        raise ValueError(f"X has shape {shape}; {_EXPECTED}: reshape X.")
    dtype = str(sample.dtype).removeprefix("torch.")
    if dtype != "uint8" and not dtype.startswith(("float", "bfloat")):
        raise ValueError(
            f"X has dtype {dtype}; expected floats, or uint8 from 0 to 255: convert X "
            "with astype."
        )
    if len(shape) == 4 and shape[3] in (1, 3, 4) and shape[1] > 4:
        raise ValueError(
            f"X has shape {shape}, channels last; {_EXPECTED}: use X.transpose(0, 3, "
            "1, 2)."
        )
    image_shape = (1, *shape[1:]) if len(shape) == 3 else shape[1:]
    if fitted_shape is not None and image_shape != fitted_shape:
        raise ValueError(
            f"X has images of shape {image_shape} (channels, height, width), but the "
            f"net was fitted on {fitted_shape}: resize them, or fit anew."
        )
    # The sum of finite values is finite, short of overflow: one pass and no copy for
    # sound data.
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = sample is X and dtype != "uint8" and not math.isfinite(X.sum())
    if suspicious:
        finite = torch.isfinite(torch.as_tensor(X, device="cpu")).flatten(1).all(1)
        if not finite.all():
            raise ValueError(
                f"X has NaN or infinite values in {int((~finite).sum())} of {len(X)} "
                f"images, the first at position {int((~finite).nonzero()[0])}; drop or "
                "repair them."
            )
    return image_shape


def as_labels(y: Any, name: str = "y") -> np.ndarray:
    """Return labels as an array of shape (n_samples,).

    Raises
    ------
    ValueError
        Where they are not one integer or string per sample.
    """
    if isinstance(y, torch.Tensor):
        y = y.detach().cpu()
    y = np.asarray(y)
    if y.ndim != 1:
        if name == "classes":
            raise ValueError(
                f"classes={y.tolist()!r} is no list of labels; name every class, for "
                "instance classes=range(10)."
            )
        cure = (
            f"{name}.argmax(axis=1) of one-hot rows"
            if y.ndim == 2 and y.shape[1] > 1
            else f"{name}.ravel()"
        )
        raise ValueError(
            f"{name} has shape {y.shape}; expected one label per sample, (n_samples,): "
            f"use {cure}."
        )
    if len(y) == 0:
        raise ValueError(f"{name} holds no labels; pass at least one.")
    labels = y.tolist()
    strings = all(isinstance(label, str) for label in labels)
    integers = all(isinstance(label, Integral) for label in labels)
    integral = y.dtype.kind == "f" and bool(np.all(np.isfinite(y) & (y == np.round(y))))
    if not (strings or integers or integral):
        kinds = ", ".join(sorted({type(label).__name__ for label in labels}))
        raise ValueError(
            f"{name} has values of type {kinds}; expected whole numbers or strings, "
            f"not both: convert {name}."
        )
    # pandas gives strings as objects; classes_ and predict shall give them as strings.
    return np.array(labels) if y.dtype.kind == "O" else y


def encode_labels(y: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return the position of each label in classes, as int64.

    Raises
    ------
    ValueError
        Where a label is not among them.
    """
    position = {label: column for column, label in enumerate(classes.tolist())}
    labels: list[Any] = y.tolist()
    unknown = sorted(set(labels) - set(position))
    if unknown:
        raise ValueError(
            f"y holds {unknown[:5]}, not among the {len(classes)} classes "
            f"{classes[:20].tolist()}; name every class with classes=, and fit anew."
        )
    return np.array([position[label] for label in labels], dtype=np.int64)


def slow_steps(steps: Iterable[Any], what: str, shown: bool = True) -> Iterable[Any]:
    """The same steps, with a bar once they have taken a second."""
    return tqdm(steps, desc=what, leave=False, delay=1, disable=not shown)
