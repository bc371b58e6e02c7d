"""What torch says about samples and labels of a wrong dtype, in words with a cure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

# Parts of torch's messages about labels that cannot be column numbers.
ABOUT_LABELS = re.compile(r"Target \S+ is out of bounds|target dtype|invalid data type")
ABOUT_FLOATS = re.compile(r"double|float64|dtype|datatype", re.IGNORECASE)


@contextmanager
def explained(X: Any, y: Any = None) -> Iterator[None]:
    """Raise ValueError in words where torch finds float64 samples or labels that skorch
    cannot take; any other error as it is.
    """
    try:
        yield
    except (RuntimeError, IndexError, TypeError) as error:
        text = str(error)
        if y is not None and ABOUT_LABELS.search(text):
            labels = np.asarray(y)
            shown = ", ".join(map(repr, np.unique(labels).tolist()[:5]))
            raise ValueError(
                f"y holds {shown}, of dtype {labels.dtype}, and a skorch net takes "
                f"column numbers 0, 1, ... of dtype int64 ({text.rstrip('.')}): encode "
                "y with sklearn.preprocessing.LabelEncoder. ResNet18Classifier takes "
                "any labels."
            ) from error
        if ABOUT_FLOATS.search(text) and "float64" in _dtypes(X):
            raise ValueError(
                f"X is float64, and the net's weights are not ({text.rstrip('.')}): "
                'pass X.astype("float32").'
            ) from error
        raise


def _dtypes(X: Any) -> set[str]:
    """Names of the dtypes in an array, tensor, DataFrame or dict of these."""
    if isinstance(X, dict):
        return set().union(*map(_dtypes, X.values()))
    found = list(X.dtypes) if hasattr(X, "dtypes") else [getattr(X, "dtype", None)]
    return {str(dtype).removeprefix("torch.") for dtype in found}
