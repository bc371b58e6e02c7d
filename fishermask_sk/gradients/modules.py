"""Small things that every look into a torch module needs: where its weights lie, and
leaving it as found.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from fishermask_sk.gradients.devices import suited_to_gradients

Batch = Any


def parameter_slices(module: nn.Module) -> dict[str, slice]:
    """Where each parameter lies in the flat vector of
    `parameters_to_vector(module.parameters())`.

    Examples
    --------
    >>> parameter_slices(nn.Linear(3, 2))
    {'weight': slice(0, 6, None), 'bias': slice(6, 8, None)}
    """
    slices, start = {}, 0
    for name, parameter in module.named_parameters():
        slices[name] = slice(start, start + parameter.numel())
        start += parameter.numel()
    return slices


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and nothing compiled; afterwards all is as before, after
    errors too.

    What is given back are modes, `requires_grad`, and every attribute of every module
    as it stood: parameters and buffers, and what else a module keeps (the product of a
    pruned weight and its mask, a cache), each the same object with the same numbers.
    This holds the module's numbers twice.

    Compiled modules run as they were written: the hooks that see a layer's input do
    not reach into compiled code. Transformers take no fast path, which has no
    gradients and, under padding, other scores. A caller's autocast is off, for sums
    and products of gradients need float32 at least; one inside the module's `forward`
    is the module's own. `suited_to_gradients` says what else is set aside.
    """
    modules = list(module.modules())
    state = [_State(m) for m in modules]
    needs_grad = [(p, p.requires_grad) for p in module.parameters()]
    try:
        module.eval()
        with (
            _uncompiled(),
            _without_fast_path(),
            _without_autocast({p.device.type for p in module.parameters()}),
            suited_to_gradients(module),
        ):
            yield
    finally:
        for each in state:
            each.restore()
        _put_back([pair for each in state for pair in each.contents])
        for p, needed in needs_grad:
            p.requires_grad_(needed)


class _State:
    """The attributes of one module (not of those inside it), to be put back."""

    def __init__(self, module: nn.Module) -> None:
        attributes = vars(module)
        # Among its dictionaries are those of its parameters, buffers and hooks.
        inside = [v for v in attributes.values() if isinstance(v, (dict, list))]
        self.spaces: list[Any] = [attributes, *inside]
        self.before = [space.copy() for space in self.spaces]
        self.contents = [
            (value, value.detach().clone())
            for space in self.before
            for value in (space.values() if isinstance(space, dict) else space)
            if isinstance(value, Tensor)
        ]

    def restore(self) -> None:
        for space, before in zip(self.spaces, self.before, strict=True):
            if isinstance(space, list):
                space[:] = before
                continue
            if list(space) != list(before):  # the order of parameters is theirs
                space.clear()
            space.update(before)


@torch.no_grad()
def _put_back(contents: list[tuple[Tensor, Tensor]]) -> None:
    """Write into tensors what they held before, where they hold something else now."""
    if not contents:
        return
    device = contents[0][0].device  # one look at all of them: it waits for the device
    changed = [(tensor != before).any().to(device) for tensor, before in contents]
    for (tensor, before), is_changed in zip(
        contents, torch.stack(changed).tolist(), strict=True
    ):
        if is_changed:
            tensor.copy_(before)


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Attention and encoder layers compute what they would with gradients."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _uncompiled() -> AbstractContextManager[Any]:
    """Inside, `torch.compile`d modules and functions run eagerly (from torch 2.6
    on).
    """
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return (
            nullcontext()
        )  # nothing is compiled yet, and importing the compiler takes seconds
    return torch.compiler.set_stance("force_eager")


@contextmanager
def _without_autocast(devices: set[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for device in filter(torch.amp.is_autocast_available, {"cpu", *devices}):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Apply a function to every tensor in a batch made of mappings, lists and
    tuples.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        found = {key: map_tensors(function, value) for key, value in batch.items()}
        if type(batch) is dict:
            return found
        twin: Any = copy(batch)  # a mapping of its own kind, as tokenizers give it
        twin.update(found)
        return twin
    if isinstance(batch, (list, tuple)):
        parts = [map_tensors(function, value) for value in batch]
        # A named tuple takes its values one by one.
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
