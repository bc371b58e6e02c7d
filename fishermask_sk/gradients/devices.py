"""Where a query computes, and how: on one device, float32 as float32, recurrent layers
that can be differentiated.

This file sees torch modules and torch's settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import nn

# Operations of `torch.backends` that may compute float32 products in less.
OPERATIONS = (
    *("cuda.matmul", "cudnn.conv", "cudnn.rnn"),
    *("mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"),
)


def check_device(module: nn.Module) -> None:
    """Refuse a net that no query can work on where it lies.

    Raises
    ------
    ValueError
    """
    devices = sorted({str(p.device) for p in module.parameters()})
    if len(devices) > 1:
        raise ValueError(
            f"The net's weights lie on {', '.join(devices)}; expected one device: a "
            "query holds gradients of all of them side by side. Move the net to one, "
            "module.to(device), or train it there."
        )
    if any(device.startswith("mps") for device in devices):
        raise ValueError(
            "The net is on MPS, which has no float64, and the selection needs it. "
            'Move the net to the CPU for queries: module.to("cpu"), with device="cpu" '
            "in skorch."
        )


@contextmanager
def suited_to_gradients(module: nn.Module) -> Iterator[None]:
    """Inside, torch computes as per-sample gradients and sums of them need it;
    afterwards its settings are as before.

    - float32 products are made in float32. TF32 and bfloat16, which torch may be told
      to use for them, keep three digits: too few for gains that are compared, and for
      gradients that are checked against autograd.
    - Recurrent layers do without cuDNN, whose backward pass wants training mode.
    - What spreads a batch over several devices or processes (`DataParallel`,
      `DistributedDataParallel`) runs here alone.
    """
    with ExitStack() as stack:
        _use_float32(stack)
        if any(isinstance(m, nn.RNNBase) for m in module.modules()):
            _set(stack, torch.backends.cudnn, "enabled", False)
        for m in module.modules():
            if isinstance(m, nn.DataParallel):
                _set(stack, m, "device_ids", [])
            elif isinstance(m, nn.parallel.DistributedDataParallel):
                _set(stack, m, "require_backward_grad_sync", False)
                _set(stack, m, "require_forward_param_sync", False)
        yield


def _set(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until the end of `stack`."""
    before = getattr(owner, name)
    if before != value:
        stack.callback(setattr, owner, name, before)
        setattr(owner, name, value)


def _use_float32(stack: ExitStack) -> None:
    """Full precision, through the interface that the user went through.

    Torch has an older one (`set_float32_matmul_precision`, `allow_tf32`) and, from 2.9,
    a newer one (`fp32_precision`, which an operation inherits from what stands above
    it). Where the two disagree, reading the older raises:
    https://docs.pytorch.org/docs/stable/notes/cuda.html
    """
    stack.callback(_restore_precisions, {name: _precision(name) for name in OPERATIONS})
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    by_newer = ["mkldnn.conv", "mkldnn.rnn"]
    inherited = _precision("") != "none"
    if inherited or not _readable(lambda: matmul.allow_tf32):
        by_newer += ["cuda.matmul", "mkldnn.matmul"]
    elif (precision := torch.get_float32_matmul_precision()) != "highest":
        stack.callback(torch.set_float32_matmul_precision, precision)
        torch.set_float32_matmul_precision("highest")
    inherited = inherited or _precision("cudnn") != "none"
    if inherited or not _readable(lambda: cudnn.allow_tf32):
        by_newer += ["cudnn.conv", "cudnn.rnn"]
    else:
        _set(stack, cudnn, "allow_tf32", False)
    for name in by_newer:
        if _precision(name) not in ("none", "ieee"):
            _set_precision(name, "ieee")


def _readable(read: Callable[[], object]) -> bool:
    try:
        read()
    except RuntimeError:
        return False
    return True


def _precision(operation: str) -> str:
    """`fp32_precision` of an operation of `torch.backends`, or of all for ""; "none"
    where this torch does not have it.
    """
    owner: Any = torch.backends
    for name in filter(None, operation.split(".")):
        owner = getattr(owner, name, None)
    return getattr(owner, "fp32_precision", "none")


def _set_precision(operation: str, precision: str) -> None:
    attrgetter(operation)(torch.backends).fp32_precision = precision


def _restore_precisions(before: dict[str, str]) -> None:
    for operation, precision in before.items():
        # What an operation had by default: cuDNN's its own, the others what they
        # inherit.
        if _precision(operation) != precision and not operation.startswith("cudnn"):
            _set_precision(operation, "none")
        if _precision(operation) != precision:
            _set_precision(operation, precision)
