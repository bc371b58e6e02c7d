"""Rows of whatever holds samples: arrays, images, tensors, DataFrames, sparse matrices,
dicts, Datasets.

Knows no learner and no net. scikit-learn's indexing does what it can; dicts and
Datasets are added here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.utils import _safe_indexing, indexable
from skorch.helper import SliceDataset
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset


def refuse_what_has_no_rows(data: Any, name: str) -> None:
    """Refuse what holds no samples that a position names.

    Raises
    ------
    TypeError
    """
    if isinstance(data, DataLoader):
        raise TypeError(
            f"{name} is a {type(data).__name__}, which gives batches in an order of "
            "its own; pass loader.dataset, whose samples have positions. The net makes "
            "batches of it (batch_size, and iterator_valid for a loader of your own)."
        )
    if isinstance(data, IterableDataset):
        raise TypeError(
            f"{name} is a {type(data).__name__}, an IterableDataset: its samples come "
            "one after the other and have no positions to answer with. Pass a Dataset "
            "with __len__ and __getitem__, or the samples as one array."
        )
    has_rows = any(hasattr(data, name) for name in ("shape", "__array__")) or (
        hasattr(data, "__len__") and hasattr(data, "__getitem__")
    )
    if isinstance(data, Dataset) and not has_rows:
        raise TypeError(
            f"{name} is a {type(data).__name__} without __len__; say in it how many "
            "samples it has."
        )
    if (
        data is None
        or not has_rows
        or isinstance(data, (str, bytes))
        or getattr(data, "shape", None) == ()
    ):
        raise TypeError(f"{name} is {data!r:.40}; pass samples, one a row.")


def as_rows(data: Any, name: str) -> Any:
    """Return the data such that rows can be taken from it, unchanged wherever that is
    so already.
    """
    if _is_dict(data):
        return {key: as_rows(value, f"{name}[{key!r}]") for key, value in data.items()}
    if data is None:
        raise ValueError(f"{name} is None; pass the samples, one a row.")
    if getattr(data, "shape", None) == ():
        raise ValueError(
            f"{name} is the single value {data!r}; pass an array with one row per "
            "sample."
        )
    refuse_what_has_no_rows(data, name)
    return data if isinstance(data, Dataset) else indexable(data)[0]


def n_rows(data: Any, name: str) -> int:
    """Count the rows.

    Raises
    ------
    ValueError
        Where the arrays of a dict do not have one length.
    """
    if _is_dict(data):
        lengths = {key: n_rows(value, name) for key, value in data.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(
                f"{name} is a dict whose arrays have {lengths} rows; pass one row each "
                "per sample."
            )
        return next(iter(lengths.values()))
    return (
        len(data)
        if isinstance(data, Dataset) or not hasattr(data, "shape")
        else int(data.shape[0])
    )


def take_rows(data: Any, indices: np.ndarray) -> Any:
    """Return the rows at these positions, in the container they came in; a Dataset is
    not read for it.
    """
    if _is_dict(data):
        return {key: take_rows(value, indices) for key, value in data.items()}
    if isinstance(data, SliceDataset):
        return data[indices]
    if isinstance(data, Dataset):
        # Plain ints: a Dataset's author thinks of lists and file names, not of numpy
        # scalars.
        return Subset(data, indices.tolist())
    return _safe_indexing(data, indices)


def _is_dict(data: Any) -> bool:
    # scipy's dictionary-of-keys matrix calls itself a Mapping
    return isinstance(data, Mapping) and not issparse(data)
