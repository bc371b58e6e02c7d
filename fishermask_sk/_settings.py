"""What the rows of a comparison depend on, in words that JSON can hold and two runs can compare."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import joblib
import numpy as np
import torch
from scipy.sparse import issparse


def describe(thing: Any, _above: tuple[int, ...] = ()) -> Any:
    """Describe an estimator, strategy or parameter: the same in every process, different where it differs.

    Estimators are described by their parameters, functions by name, partials by what they bind, arrays and
    tensors by a digest of their content, other objects by their attributes.

    Examples
    --------
    >>> from functools import partial
    >>> from sklearn.naive_bayes import GaussianNB
    >>> describe(GaussianNB())["params"]
    {'priors': None, 'var_smoothing': 1e-09}
    >>> describe(partial(max, default=0))["keywords"]
    {'default': 0}
    """
    if thing is None or isinstance(thing, (bool, int, float, str)):
        return thing
    if isinstance(thing, np.generic):
        return thing.item()
    if isinstance(thing, (type, FunctionType, BuiltinFunctionType)):
        return _name(thing)
    if id(thing) in _above:  # an object that holds itself
        return type(thing).__name__
    above = (*_above, id(thing))
    if isinstance(thing, MethodType):
        return {"method": thing.__name__, "of": describe(thing.__self__, above)}
    if isinstance(thing, partial):
        keywords = {key: describe(value, above) for key, value in sorted(thing.keywords.items())}
        return {
            "partial": describe(thing.func, above),
            "args": describe(list(thing.args), above),
            "keywords": keywords,
        }
    if isinstance(thing, (list, tuple)):
        return [describe(value, above) for value in thing]
    if isinstance(thing, (set, frozenset)):
        return sorted((describe(value, above) for value in thing), key=str)
    if isinstance(thing, dict):
        return {str(key): describe(value, above) for key, value in thing.items()}
    if isinstance(thing, torch.Tensor):
        thing = thing.detach().cpu().numpy()
    if isinstance(thing, np.ndarray):
        return f"{thing.dtype}{list(thing.shape)} {joblib.hash(thing, coerce_mmap=True)}"
    if issparse(thing):
        return describe([thing.tocsr().data, thing.tocsr().indices, thing.tocsr().indptr], above)
    if hasattr(thing, "iloc"):  # pandas: content, not memory layout
        names = [
            str(name) for name in getattr(thing, "columns", [thing.name if hasattr(thing, "name") else ""])
        ]
        return {"columns": names, "content": describe(thing.to_numpy(), above)}
    if hasattr(thing, "get_params"):
        params = sorted(thing.get_params(deep=False).items())
        return {"class": _name(type(thing)), "params": {key: describe(value, above) for key, value in params}}
    attributes = getattr(thing, "__dict__", {})
    return {"class": _name(type(thing)), **{key: describe(value, above) for key, value in attributes.items()}}


def digest(data: Any) -> str:
    """A short name for the content of samples or labels."""
    return hashlib.sha256(json.dumps(describe(data), sort_keys=True).encode()).hexdigest()[:16]


def _name(thing: Any) -> str:
    name = f"{thing.__module__}.{thing.__qualname__}"
    code = getattr(thing, "__code__", None)
    if "<lambda>" in name and code is not None:  # all lambdas have one name
        name += " " + hashlib.sha256(code.co_code + repr(code.co_consts).encode()).hexdigest()[:16]
    return name
