"""Images laid out pixel by pixel, channels last: the same numbers in another order.

oneDNN's convolutions and their backward passes take 0.6 to 1 times as long on images
that lie so. Nothing else about them changes, and the net's weights stay as they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fishermask_sk.gradients.modules import map_tensors

# How far apart scores may be in the two orders, relative to the largest: sums of
# products are taken in another order.
ROUNDING = 1e-4
# So many channels are safe: those that went wrong had seven at most.
SAFE_CHANNELS = 16


def channels_last(batch: Any) -> Any:
    """The batch, with images (n, c, h, w) among its tensors laid out as (n, h, w, c).

    Parameters
    ----------
    batch : inputs of a module
    """
    return map_tensors(_laid_out, batch)


def gains_by_channels_last(module: nn.Module) -> bool:
    """Whether the module has convolutions that oneDNN runs in float32, on a CPU, and
    none that it gets wrong.
    """
    convolutions = [
        m
        for m in module.modules()
        if isinstance(m, nn.Conv2d)
        and m.weight.dtype == torch.float32
        and m.weight.device.type == "cpu"
    ]
    return (
        torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and bool(convolutions)
        and not any(
            _goes_wrong(m.weight, getattr(m, "stride", (1,))) for m in convolutions
        )
    )


class Convolutions(TorchDispatchMode):
    """Inside, every convolution is looked at, in layers or not.

    Attributes
    ----------
    any_wrong : bool
        Whether oneDNN would get one of them wrong.
    """

    def __init__(self) -> None:
        super().__init__()
        self.any_wrong = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """As without, but convolutions are noted."""
        if func is torch.ops.aten.convolution.default:
            _, weight, _, stride, *_ = args
            self.any_wrong |= _goes_wrong(weight, stride)
        return func(*args, **(kwargs or {}))


def _goes_wrong(weight: Tensor, stride: Sequence[int]) -> bool:
    """Whether the backward pass of such a convolution writes beyond its memory in torch
    2.14, from images that lie so: 1×1 kernels with a stride and fewer than 8 channels
    do. 18,000 random convolutions without such were right, under a malloc that checks.
    """
    return (
        max(weight.shape[2:]) == 1
        and max(stride) > 1
        and weight.shape[1] < SAFE_CHANNELS
    )


def same_scores(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs differ by roundings alone."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    return bool((a - b).abs().max() <= ROUNDING * a.abs().max())


def _laid_out(tensor: Tensor) -> Tensor:
    if tensor.ndim != 4 or tensor.dtype != torch.float32 or not tensor.numel():
        return tensor
    _, c, h, w = tensor.shape
    if c > 1:
        return tensor.contiguous(memory_format=torch.channels_last)
    # One channel lies the same in both orders; only these strides say which is meant.
    return tensor.contiguous().as_strided(tensor.shape, (h * w, 1, w, 1))
