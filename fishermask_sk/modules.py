"""Small things that every look into a torch module needs: where its weights lie, and
leaving it as found.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

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

    What is given back are modes, `requires_grad` and buffers. Compiled modules run as
    they were written: the hooks that see a layer's input do not reach into compiled
    code. A caller's autocast is off, for sums and products of gradients need float32 at
    least; one inside the module's `forward` is the module's own.
    """
    modes = [(m, m.training) for m in module.modules()]
    needs_grad = [(p, p.requires_grad) for p in module.parameters()]
    buffers = [
        (m, name, buffer, None if buffer is None else buffer.clone())
        for m in module.modules()
        for name, buffer in m._buffers.items()
    ]
    try:
        module.eval()
        with (
            _uncompiled(),
            _without_autocast({p.device.type for p in module.parameters()}),
        ):
            yield
    finally:
        for m, training in modes:
            m.training = training
        for p, needed in needs_grad:
            p.requires_grad_(needed)
        with torch.no_grad():
            for m, name, buffer, before in buffers:
                if (
                    buffer is not None
                    and before is not None
                    and not torch.equal(buffer, before)
                ):
                    buffer.copy_(before)
                m._buffers[name] = (
                    buffer  # forward may have put another tensor in its place
                )


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
    """Apply a function to every tensor in a batch made of dicts, lists and tuples."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(map_tensors(function, value) for value in batch)
    return batch
