r"""Per-sample weight gradients of one layer, from what it saw (a) and the gradient at
its output (g).

Every rule is a sum of products over the positions p where a weight is used (pixels,
tokens):
:math:`\partial_{w_j} = \sum_p g_{o(j),p}\, a_{t(j),p}`. A rule is called with the
layer's input and the entries of the flattened parameter that are wanted, and returns a
function from g to their gradients; what depends on the input alone is done once and
serves every class. n is the number of samples, m of entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FromOutputGradient = Callable[[Tensor], Tensor]
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d

# A batched matrix product over a grid of entries beats gathering each entry until the
# grid is this much larger.
GRID_FACTOR = 16
# Otherwise this many products of single entries are made at a time, and of what a layer
# saw this many numbers are kept for the next gradient.
PAIRED_AT_A_TIME, PAIRED_KEPT = 2**22, 2**24
# With no more positions than this, sums of squares are sums over pairs of positions.
MAX_PAIRED_POSITIONS = 4
# Otherwise this many squares are held at a time, and this few matrices of them are
# summed one by one.
SQUARED_AT_A_TIME, MAX_LOOPED = 2**20, 8


def held_numbers(module: nn.Module, seen: Tensor, n_entries: int | None) -> int:
    """About how many numbers a rule makes of what a layer saw before it meets a
    gradient, for so many entries, or for all.
    """
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return seen.numel() if isinstance(module, nn.Linear) else 2 * seen.numel()
    padded = seen.numel()
    positions = padded // max(1, seen.shape[1] * prod(module.stride))
    n_columns = module.in_channels * prod(module.kernel_size)
    return padded + positions * min(n_columns, n_entries or n_columns)


class Rule(NamedTuple):
    """The gradients of one parameter: `entries` per sample (n, m), `squares` summed
    over samples.
    """

    entries: Callable[[Any, Tensor, Tensor], FromOutputGradient]
    squares: Callable[[Any, Tensor], FromOutputGradient]


def find_rule(module: nn.Module, name: str) -> Rule | None:
    """The rule for parameter `name` of this module, or None where there is none."""
    if (
        isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
        and module.running_mean is None
    ):
        return None  # normalised by the batch: a sample has no gradient of its own
    if isinstance(module, nn.Embedding) and module.scale_grad_by_freq:
        return None
    for kinds, rules in _RULES:
        if isinstance(module, kinds):
            return rules.get(name)
    return None


def _gather(
    m_rows: Tensor, m_columns: Tensor, columns: Callable[[Tensor], Tensor]
) -> FromOutputGradient:
    """Σ_p g[o, p]·a[t, p] for pairs (o, t): a product over the grid of all o and t, or
    pair by pair.
    """
    rows, row_of = torch.unique(m_rows, return_inverse=True)
    distinct, column_of = torch.unique(m_columns, return_inverse=True)
    if len(rows) * len(distinct) <= GRID_FACTOR * len(m_rows):
        a = columns(distinct).mT
        cell = row_of * len(distinct) + column_of
        whole = len(cell) == len(rows) * len(distinct) and bool(
            (cell.diff() == 1).all()
        )

        def from_grid(g: Tensor) -> Tensor:
            grid = (g[:, rows] @ a).flatten(1)
            return grid if whole else grid[:, cell]

        return from_grid
    kept: list[Tensor] = []

    def from_pairs(g: Tensor) -> Tensor:
        size = g[:, 0].numel()
        step = max(1, PAIRED_AT_A_TIME // max(1, size))
        if not kept and size * len(m_rows) <= PAIRED_KEPT:
            kept.extend(columns(part) for part in m_columns.split(step))
        seen = kept or (columns(part) for part in m_columns.split(step))
        parts = zip(m_rows.split(step), seen, strict=True)
        return torch.cat([(g[:, o] * a).sum(-1) for o, a in parts], dim=1)

    return from_pairs


# Linear: ∂W[o, i] = Σ_p g[p, o]·a[p, i], ∂b[o] = Σ_p g[p, o]; p runs over all axes but
# the first and last.


def _positions_last(x: Tensor) -> Tensor:
    """(n, *, features) -> (n, features, p)."""
    return x.reshape(len(x), -1, x.shape[-1]).mT


def _linear_entries(
    module: nn.Linear, a: Tensor, entries: Tensor
) -> FromOutputGradient:
    a = _positions_last(a)
    rows = _gather(
        entries // a.shape[1], entries % a.shape[1], lambda columns: a[:, columns]
    )
    return lambda g: rows(_positions_last(g))


def _linear_squares(module: nn.Linear, a: Tensor) -> FromOutputGradient:
    squares = _squared_products(_positions_last(a).mT)
    return lambda g: squares(_positions_last(g))


def _linear_bias(g: Tensor) -> Tensor:
    return _positions_last(g).sum(-1)


# Convolution: ∂W[o, i, tap] = Σ_p g[o, p]·a[i, p·stride + tap·dilation − padding],
# within o's group.


def _channels_first(g: Tensor) -> Tensor:
    """(n, channels, *) -> (n, channels, p)."""
    return g.flatten(2) if g.ndim > 2 else g[..., None]


def _padded(module: Conv, a: Tensor) -> Tensor:
    padding = module._reversed_padding_repeated_twice
    return F.pad(
        a,
        padding,
        mode="constant" if module.padding_mode == "zeros" else module.padding_mode,
    )


def _windows(module: Conv, padded: Tensor) -> Iterator[tuple[Any, ...]]:
    """For every tap of the kernel, in the weight's order, the pixels that it meets."""
    size = [
        (length - dilation * (kernel - 1) - 1) // stride + 1
        for length, kernel, stride, dilation in zip(
            padded.shape[2:],
            module.kernel_size,
            module.stride,
            module.dilation,
            strict=True,
        )
    ]
    for tap in product(*map(range, module.kernel_size)):
        steps = zip(tap, module.dilation, module.stride, size, strict=True)
        yield (
            ...,
            *(
                slice(t * dilation, t * dilation + stride * (n - 1) + 1, stride)
                for t, dilation, stride, n in steps
            ),
        )


def _conv_entries(module: Conv, a: Tensor, entries: Tensor) -> FromOutputGradient:
    a = _padded(module, a)
    windows = list(_windows(module, a))
    per_output = module.weight[0].numel()
    out = entries // per_output
    group = out // (module.out_channels // module.groups)
    channel = group * (
        module.in_channels // module.groups
    ) + entries % per_output // len(windows)
    seen = channel * len(windows) + entries % len(
        windows
    )  # which (channel, tap) of the whole input

    def columns(wanted: Tensor) -> Tensor:
        result = a.new_empty(len(a), len(wanted), a[0, 0][windows[0]].numel())
        for tap, window in enumerate(windows):
            here = (wanted % len(windows) == tap).nonzero()[:, 0]
            if len(here):
                result[:, here] = a[:, wanted[here] // len(windows)][window].flatten(2)
        return result

    rows = _gather(out, seen, columns)
    return lambda g: rows(_channels_first(g))


def _conv_squares(module: Conv, a: Tensor) -> FromOutputGradient:
    a = _padded(module, a)
    columns = torch.stack(
        [a[window].flatten(2) for window in _windows(module, a)], dim=2
    )
    columns = columns.reshape(len(a) * module.groups, -1, columns.shape[-1]).mT
    if module.groups == 1:
        of_one_group = _squared_products(columns)
        return lambda g: of_one_group(_channels_first(g))

    def squares(g: Tensor) -> Tensor:
        g = _channels_first(g)
        total = module.weight.new_zeros(module.weight.numel(), dtype=g.dtype)
        step = max(1, SQUARED_AT_A_TIME // len(total)) * module.groups
        of_groups = g.reshape(len(g) * module.groups, -1, g.shape[-1])
        for part, seen in zip(of_groups.split(step), columns.split(step), strict=True):
            total += (part @ seen).square_().reshape(-1, len(total)).sum(0)
        return total

    return squares


def _squared_products(a: Tensor) -> FromOutputGradient:
    """Σ_n (Σ_p g[n, o, p]·a[n, p, t])² for every pair (o, t), as a function of g.

    Where there are few positions, the square is written out as Σ_p Σ_q (g_p g_q)(a_p
    a_q): one product of large matrices instead of one gradient matrix for every sample.
    """
    n, n_positions, n_columns = a.shape
    if n_positions <= MAX_PAIRED_POSITIONS:
        p, q = torch.triu_indices(n_positions, n_positions, device=a.device)
        twice = (2 - (p == q).to(a.dtype))[:, None]
        of_columns = (a[:, p] * a[:, q] * twice).flatten(0, 1)

        def from_pairs(g: Tensor) -> Tensor:
            of_rows = (g[..., p] * g[..., q]).mT.flatten(0, 1)
            return (of_rows.mT @ of_columns).clamp_min_(
                0
            )  # rounding may leave less than nothing

        return from_pairs

    def one_by_one(g: Tensor) -> Tensor:
        step = max(1, SQUARED_AT_A_TIME // (g.shape[1] * n_columns))
        total = g.new_zeros(g.shape[1], n_columns)
        for start in range(0, n, step):
            products = g[start : start + step] @ a[start : start + step]
            if step > MAX_LOOPED:
                total += products.square_().sum(0)
            else:
                for (
                    gradient
                ) in products:  # large: read once, nothing written beside the sum
                    total.addcmul_(gradient, gradient)
        return total

    return one_by_one


# Normalisation: ∂γ[c] = Σ_p g[c, p]·x̂[c, p], ∂β[c] = Σ_p g[c, p].


def _batch_norm(module: nn.BatchNorm2d, a: Tensor) -> Tensor:
    assert module.running_mean is not None
    assert module.running_var is not None
    mean, variance = module.running_mean.to(a.dtype), module.running_var.to(a.dtype)
    return _channels_first(F.batch_norm(a, mean, variance, eps=module.eps))


def _group_norm(module: nn.GroupNorm, a: Tensor) -> Tensor:
    return _channels_first(F.group_norm(a, module.num_groups, eps=module.eps))


def _layer_norm(module: nn.LayerNorm, a: Tensor) -> Tensor:
    return _normalized_last(
        module, F.layer_norm(a, module.normalized_shape, eps=module.eps)
    )


def _normalized_last(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """(n, *, *normalized_shape) -> (n, features, p)."""
    return _positions_last(x.flatten(x.ndim - len(module.normalized_shape)))


def _scale_rule(normalized: Callable[[Any, Tensor], Tensor]) -> Rule:
    def entries(module: Any, a: Tensor, wanted: Tensor) -> FromOutputGradient:
        x = normalized(module, a)[:, wanted]
        return lambda g: (_by_feature(module, g)[:, wanted] * x).sum(-1)

    def squares(module: Any, a: Tensor) -> FromOutputGradient:
        x = normalized(module, a)
        return lambda g: (_by_feature(module, g) * x).sum(-1).square().sum(0)

    return Rule(entries, squares)


def _by_feature(module: Any, g: Tensor) -> Tensor:
    return (
        _normalized_last(module, g)
        if isinstance(module, nn.LayerNorm)
        else _channels_first(g)
    )


def _bias_rule(per_sample: Callable[[Any, Tensor], Tensor]) -> Rule:
    """∂b = Σ_p g, whatever the layer saw."""
    return Rule(
        entries=lambda module, a, wanted: lambda g: per_sample(module, g)[:, wanted],
        squares=lambda module, a: lambda g: per_sample(module, g).square().sum(0),
    )


# Embedding: ∂W[v, d] = Σ_p [token_p = v]·g[p, d]; the padding token learns nothing.


def _embedding_entries(
    module: nn.Embedding, a: Tensor, entries: Tensor
) -> FromOutputGradient:
    tokens = a.reshape(len(a), 1, -1)

    def met(wanted: Tensor) -> Tensor:
        found = tokens == wanted[:, None]
        if module.padding_idx is not None:
            found &= (wanted != module.padding_idx)[:, None]
        return found.to(module.weight.dtype)

    width = module.embedding_dim
    rows = _gather(entries % width, entries // width, met)
    return lambda g: rows(_positions_last(g))


def _embedding_squares(module: nn.Embedding, a: Tensor) -> FromOutputGradient:
    sample = torch.arange(len(a), device=a.device)[:, None] * module.num_embeddings
    used, slot = torch.unique(a.reshape(len(a), -1) + sample, return_inverse=True)
    token = used % module.num_embeddings

    def squares(g: Tensor) -> Tensor:
        g = g.reshape(slot.numel(), -1)
        summed = g.new_zeros(len(used), g.shape[1]).index_add_(0, slot.flatten(), g)
        if module.padding_idx is not None:
            summed[token == module.padding_idx] = 0
        return g.new_zeros(module.num_embeddings, g.shape[1]).index_add_(
            0, token, summed.square()
        )

    return squares


_CHANNEL_BIAS = _bias_rule(lambda module, g: _channels_first(g).sum(-1))
_RULES: tuple[tuple[tuple[type[nn.Module], ...], dict[str, Rule]], ...] = (
    (
        (nn.Linear,),
        {
            "weight": Rule(_linear_entries, _linear_squares),
            "bias": _bias_rule(lambda module, g: _linear_bias(g)),
        },
    ),
    (
        (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        {"weight": Rule(_conv_entries, _conv_squares), "bias": _CHANNEL_BIAS},
    ),
    (
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
        {"weight": _scale_rule(_batch_norm), "bias": _CHANNEL_BIAS},
    ),
    ((nn.GroupNorm,), {"weight": _scale_rule(_group_norm), "bias": _CHANNEL_BIAS}),
    (
        (nn.LayerNorm,),
        {
            "weight": _scale_rule(_layer_norm),
            "bias": _bias_rule(lambda module, g: _by_feature(module, g).sum(-1)),
        },
    ),
    ((nn.Embedding,), {"weight": Rule(_embedding_entries, _embedding_squares)}),
)
