"""Batches of a net's own loader for prediction, samples in the order of their
positions.

skorch predicts with the user's `iterator_valid`. Where that shuffles, samples, sorts or
drops, the i-th score is not the i-th sample's. A torch DataLoader is made to go through
the positions in order; whatever else there is is tried on a few samples, and refused
where it mixes them up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from skorch import NeuralNet
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    SequentialSampler,
    Subset,
)

from fishermask_sk.gradients.modules import undisturbed
from fishermask_sk.nets.inside import nets_inside, whole_module

# Samples on which a loader of another kind is tried, spread over all.
PROBES = 16
# What a net's forward raises on samples that it was not made for.
FORWARD_ERRORS = (AttributeError, RuntimeError, ValueError, TypeError, IndexError)
UNMADE = (
    "batch must contain|equal size|stack expects|not resizable|inhomogeneous"
    "|only tensors, arrays"
)


def loader_in_order(
    net: NeuralNet, dataset: Dataset[Any], batch_size: int | None = None
) -> Any:
    """The net's iterator for prediction over a dataset, without what would change the
    order or leave samples out.

    Raises
    ------
    ValueError
        Where a DataLoader takes its samples one by one, in an order of its own.
    """
    settings: dict[str, Any] = {}
    if batch_size is not None:
        settings["batch_size"] = batch_size
    given = net.get_params_for("iterator_valid")
    for name in ("shuffle", "drop_last"):
        if given.get(name):
            settings[name] = False
    if given.get("sampler") is not None:
        settings["sampler"] = None
    if given.get("batch_sampler") is not None:  # excludes a batch size
        settings["batch_sampler"] = None
        settings.setdefault("batch_size", net.batch_size)
    # A shallow twin with other settings; copy.copy would pickle the module on the way.
    twin = object.__new__(type(net))
    vars(twin).update(vars(net))
    vars(twin).update({f"iterator_valid__{name}": v for name, v in settings.items()})
    if isinstance(vars(twin).get("get_iterator"), _PredictsInOrder):
        del vars(twin)["get_iterator"]
    loader = twin.get_iterator(dataset, training=False)
    if isinstance(loader, DataLoader):
        _make_sequential(loader, net)
    return loader


def _make_sequential(loader: DataLoader[Any], net: NeuralNet) -> None:
    sampler = loader.batch_sampler
    if sampler is None:
        raise ValueError(
            f"iterator_valid={type(loader).__name__} has no batches (batch_size=None), "
            "so its samples cannot be matched with positions; give it a batch size."
        )
    if hasattr(loader, "in_order"):  # from torch 2.6 on
        loader.in_order = True
    if (
        type(sampler) is BatchSampler
        and type(sampler.sampler) is SequentialSampler
        and not sampler.drop_last
    ):
        return
    size = loader.batch_size or getattr(sampler, "batch_size", None) or net.batch_size
    n = len(loader.dataset)  # type: ignore[arg-type]
    # A DataLoader lets none replace its sampler by assignment, and only it knows what
    # else its class does.
    vars(loader)["batch_sampler"] = [
        list(range(start, min(start + size, n))) for start in range(0, n, size)
    ]


def check_order(net: NeuralNet, dataset: Dataset[Any], name: str) -> None:
    """Refuse a loader that is no plain DataLoader and gives samples in another order.

    It is asked for some samples one by one, forwards and backwards: each row of scores
    must be nearest to those of its own sample.

    Raises
    ------
    ValueError
    """
    loader = loader_in_order(net, dataset)
    if (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and loader.dataset is dataset
    ):
        return
    n = len(dataset)  # type: ignore[arg-type]
    positions = np.unique(np.linspace(0, n - 1, min(n, PROBES)).astype(int)).tolist()
    with torch.no_grad(), undisturbed(whole_module(net)):
        try:
            alone = torch.cat([_scores(net, dataset, [i]) for i in positions])
            forwards = _scores(net, dataset, positions)
            backwards = _scores(net, dataset, positions[::-1]).flip(0)
        except FORWARD_ERRORS:  # no matter of order; the query says what it is
            return
    scale = 1e-6 * float(alone.abs().max())
    for together in (forwards, backwards):
        if together.shape == alone.shape:
            apart = torch.cdist(together, alone)
            if bool((apart.diagonal() <= apart.min(1).values + scale).all()):
                continue
        raise ValueError(
            f"iterator_valid={_name(net.iterator_valid)} gives the samples of {name} "
            "in another order than that of their positions, or not all of them: of "
            f"{len(alone)} samples the scores of {len(together)} came back, and not "
            "each as for the sample alone. Let it keep the order in prediction, or set "
            "iterator_valid=torch.utils.data.DataLoader."
        )


def _scores(net: NeuralNet, dataset: Dataset[Any], positions: list[int]) -> Tensor:
    """The module's outputs (n, ...) on samples, in the order in which the loader gives
    them.
    """
    rows = []
    for batch in loader_in_order(net, Subset(dataset, positions)):
        result = net.infer(inputs_of(batch, net, "X"))
        rows.append(result[0] if isinstance(result, tuple) else result)
    return torch.cat(rows).flatten(1).double().cpu()


def inputs_of(batch: Any, net: NeuralNet, name: str) -> Any:
    """What a batch holds for the module: of samples and labels the samples.

    Raises
    ------
    ValueError
        For batches of three parts or more, unless the net has a way of its own with
        them.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0]
    if type(batch) not in (tuple, list) or _reads_batches(net):
        return batch
    if len(batch) == 1:
        return batch[0]
    raise ValueError(
        f"{name} is a Dataset that gives {len(batch)} values a sample, and skorch "
        "takes two: return (sample, label) from its __getitem__, with any number for "
        "a label that is not known."
    )


def readable(loader: Any, dataset: Dataset[Any], name: str) -> Iterator[Any]:
    """The batches of a loader; where it cannot make one of these samples, an error that
    says why.

    Raises
    ------
    ValueError
    """
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, TypeError, ValueError) as error:
            found = re.search(f"[^\n]*({UNMADE})[^\n]*", str(error))
            if found is None:  # the Dataset's own
                raise
            raise ValueError(
                f"The samples of {name} make no batch: {_why(found[0], dataset)}."
            ) from error
        yield batch


def _why(message: str, dataset: Dataset[Any]) -> str:
    """What to do about what torch's `default_collate` said."""
    if "batch must contain" in message:
        kind = message.rsplit("found ", 1)[-1].strip(" .")
        if "NoneType" in kind:
            return (
                "its Dataset gives None, where it needs a label, or a part of the "
                "sample; return any number, such as 0, for a label that is not known"
            )
        return (
            f"its Dataset gives {kind}, and torch makes batches of tensors, arrays and "
            "numbers; return these (torchvision.transforms.ToTensor() makes one of an "
            "image), or set iterator_valid__collate_fn"
        )
    shapes = {tuple(np.shape(_first(dataset[i]))) for i in range(min(8, _len(dataset)))}
    seen = f" ({', '.join(map(str, sorted(shapes)))})" if len(shapes) > 1 else ""
    return (
        f"they differ in shape{seen}; resize, crop or pad them to one in the Dataset, "
        "or set an iterator_valid__collate_fn that pads"
    )


def _first(sample: Any) -> Any:
    return sample[0] if isinstance(sample, (tuple, list)) else sample


def _len(dataset: Any) -> int:
    return len(dataset)


@contextmanager
def predictions_in_order(estimator: Any) -> Iterator[None]:
    """Inside, the nets in an estimator or learner predict in the order of the samples,
    whatever their loaders do.
    """
    nets = [net for _, net in nets_inside(estimator) if "get_iterator" not in vars(net)]
    for net in nets:
        vars(net)["get_iterator"] = _PredictsInOrder(net)
    try:
        yield
    finally:
        for net in nets:
            del vars(net)["get_iterator"]


class _PredictsInOrder:
    """A net's `get_iterator` for the time of `predictions_in_order`."""

    def __init__(self, net: NeuralNet) -> None:
        self.net = net

    def __call__(self, dataset: Dataset[Any], training: bool = False) -> Any:
        if training:
            return type(self.net).get_iterator(self.net, dataset, training=True)
        check_order(self.net, dataset, "the samples")
        return self._pairs(dataset)

    def _pairs(self, dataset: Dataset[Any]) -> Iterator[Any]:
        """Batches as skorch takes them, of samples and labels."""
        loader = loader_in_order(self.net, dataset)
        for batch in readable(loader, dataset, "the pool"):
            if _reads_batches(self.net):
                yield batch
            else:
                yield inputs_of(batch, self.net, "The pool"), 0


def _reads_batches(net: NeuralNet) -> bool:
    """Whether a net has a way of its own to predict from a batch."""
    return type(net).evaluation_step is not NeuralNet.evaluation_step


def _name(iterator: Any) -> str:
    return getattr(iterator, "__name__", type(iterator).__name__)
