"""What the rows of a comparison depend on, in words that JSON can hold and two runs can
compare.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from functools import partial
from importlib import import_module
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import joblib
import numpy as np
import torch
from scipy.sparse import issparse


def describe(thing: Any, _above: tuple[int, ...] = ()) -> Any:
    """Describe an estimator, strategy or parameter: the same in every process,
    different where it differs.

    Estimators are described by their parameters, functions by name and what they
    enclose, partials by what they bind, arrays and tensors by a digest of their
    content, other objects by their attributes.

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
    if isinstance(thing, (bytes, complex, torch.dtype, torch.device)):
        return repr(thing)
    if isinstance(thing, (type, BuiltinFunctionType)):
        return _name(thing)
    if id(thing) in _above:  # an object that holds itself
        return type(thing).__name__
    above = (*_above, id(thing))
    if isinstance(thing, FunctionType):
        return _describe_function(thing, above)
    if isinstance(thing, MethodType):
        return {"method": thing.__name__, "of": describe(thing.__self__, above)}
    if isinstance(thing, partial):
        keywords = {
            key: describe(value, above) for key, value in sorted(thing.keywords.items())
        }
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
        content = np.ascontiguousarray(thing)  # whatever its layout in memory
        return (
            f"{thing.dtype}{list(thing.shape)} {joblib.hash(content, coerce_mmap=True)}"
        )
    if issparse(thing):
        return describe(
            [thing.tocsr().data, thing.tocsr().indices, thing.tocsr().indptr], above
        )
    if hasattr(thing, "iloc"):  # pandas: content, not memory layout
        names = [
            str(name)
            for name in getattr(
                thing, "columns", [thing.name if hasattr(thing, "name") else ""]
            )
        ]
        return {"columns": names, "content": describe(thing.to_numpy(), above)}
    if hasattr(thing, "get_params"):
        params = sorted(thing.get_params(deep=False).items())
        return {
            "class": _name(type(thing)),
            "params": {key: describe(value, above) for key, value in params},
        }
    attributes = getattr(thing, "__dict__", None)
    if attributes is None:  # paths, ranges, generators: they say by what to pickle them
        return {"class": _name(type(thing)), "state": describe(_state(thing), above)}
    return {
        "class": _name(type(thing)),
        **{key: describe(value, above) for key, value in attributes.items()},
    }


def with_names_of_today(description: Any) -> Any:
    """A description that was written before names of this package moved.

    Examples
    --------
    >>> with_names_of_today("fishermask_sk.baselines.margin_sampling")
    'fishermask_sk.baselines.uncertainty.margin_sampling'
    """
    if isinstance(description, dict):
        return {key: with_names_of_today(value) for key, value in description.items()}
    if isinstance(description, list):
        return [with_names_of_today(value) for value in description]
    if not isinstance(description, str) or not description.startswith("fishermask_sk."):
        return description
    module, _, name = description.rpartition(".")
    try:
        return _name(getattr(import_module(module), name))
    except (ImportError, AttributeError):
        return description


def digest(data: Any) -> str:
    """A short name for the content of samples or labels."""
    return hashlib.sha256(
        json.dumps(describe(data), sort_keys=True).encode()
    ).hexdigest()[:16]


def default_of(class_name: str, parameter: str) -> Any:
    """The description of a parameter's default: what an object counts as that was
    described before its class had the parameter. None where there is none.

    Examples
    --------
    >>> default_of("sklearn.naive_bayes.GaussianNB", "var_smoothing")
    1e-09
    """
    module, _, name = class_name.rpartition(".")
    try:
        known = inspect.signature(getattr(import_module(module), name)).parameters
    except (ImportError, AttributeError, TypeError, ValueError):
        return None  # a class of a script, or one that is nowhere any more
    if parameter not in known or known[parameter].default is inspect.Parameter.empty:
        return None
    return describe(known[parameter].default)


def _describe_function(function: FunctionType, above: tuple[int, ...]) -> Any:
    """Its name, and the values that it was made with where functions of one name may
    differ.
    """
    name: Any = _name(function)
    if "<lambda>" in name:  # all lambdas have one name
        name = [name, _describe_code(function.__code__)]
    if function.__closure__ is None and not (
        "<" in function.__qualname__ and function.__defaults__
    ):
        return name
    return {
        "function": name,
        "defaults": describe(function.__defaults__, above),
        "encloses": [
            describe(cell.cell_contents, above) for cell in function.__closure__ or ()
        ],
    }


def _describe_code(code: CodeType) -> str:
    # Not repr(code.co_consts): there code inside of code shows its address, and sets
    # have any order.
    constants = [
        _describe_code(c) if isinstance(c, CodeType) else describe(c)
        for c in code.co_consts
    ]
    content = json.dumps([code.co_code.hex(), code.co_names, constants])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _state(thing: Any) -> Any:
    try:
        reduced = thing.__reduce_ex__(4)
    except TypeError:  # a lock, a socket: nothing that a setting could be
        return None
    return list(reduced[:3]) if isinstance(reduced, tuple) else reduced


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
