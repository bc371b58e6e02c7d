r"""Per-sample weight gradients of one layer, from what it saw (a) and the gradient at
its output (g).

Every rule is a sum of products over the positions p where a weight is used (pixels,
tokens):
:math:`\partial_{w_j} = \sum_p g_{o(j),p}\, a_{t(j),p}`. A rule is called with the
entries of the flattened parameter that are wanted, then with the layer's input, then
with g, and gives their gradients: what depends on the entries alone is done once and
serves every batch, and what depends on the input every class. Entries come on the CPU,
where looking at them makes no device wait. n is the number of samples, m of entries.
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
FromSeen = Callable[[Tensor], FromOutputGradient]
Columns = Callable[[Tensor], Tensor]
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d

# A batched matrix product over a grid of entries beats gathering each entry until the
# grid is this much larger.
GRID_FACTOR = 16
# Otherwise this many products of single entries are made at a time, and of what a layer
# saw this many numbers are kept for the next gradient.
PAIRED_AT_A_TIME, PAIRED_KEPT = 2**22, 2**24
# With no more positions than this, sums of squares are sums over pairs of positions.
MAX_PAIRED_POSITIONS = 4
# Otherwise this many squares are held at a time, so many as a CPU's cache takes, and
# this few matrices of them are summed one by one. An accelerator would wait for each
# launch instead: there more are held.
SQUARED_AT_A_TIME, MAX_LOOPED = 2**20, 8
SQUARED_ON_DEVICE = 2**26


def held_numbers(module: nn.Module, seen: Tensor, n_entries: int | None) -> int:
    """About how many numbers a rule makes of what a layer saw before it meets a
    gradient, for so many entries, or for all.
    """
    if isinstance(module, nn.EmbeddingBag):
        return (2 + module.embedding_dim) * seen.numel()
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return seen.numel() if isinstance(module, nn.Linear) else 2 * seen.numel()
    padded = seen.numel()
    stride = getattr(module, "stride", (1,))  # a subclass may do without
    positions = padded // max(1, seen.shape[1] * prod(stride))
    n_columns = seen.shape[1] * prod(module.weight.shape[2:])
    return padded + positions * min(n_columns, n_entries or n_columns)


class Rule(NamedTuple):
    """The gradients of one parameter: `entries` per sample (n, m), `squares` summed
    over samples.
    """

    entries: Callable[[Any, Tensor], FromSeen]
    squares: Callable[[Any, Tensor], FromOutputGradient]


def find_rule(module: nn.Module, name: str) -> Rule | None:
    """The rule for parameter `name` of this module, or None where there is none."""
    if (
        isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
        and module.running_mean is None
    ):
        return None  # normalised by the batch: a sample has no gradient of its own
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and (
        module.scale_grad_by_freq
    ):
        return None
    for kinds, rules in _RULES:
        if isinstance(module, kinds):
            return rules.get(name)
    return None


def _gather(
    module: nn.Module,
    m_rows: Tensor,
    m_columns: Tensor,
    columns: Callable[[Tensor], Columns],
) -> FromSeen:
    """Σ_p g[o, p]·a[t, p] for pairs (o, t): a product over the grid of all o and t, or
    pair by pair. `columns` of some t is a function from what the layer saw to these.
    """
    rows, row_of = torch.unique(m_rows, return_inverse=True)
    distinct, column_of = torch.unique(m_columns, return_inverse=True)
    if len(rows) * len(distinct) <= GRID_FACTOR * len(m_rows):
        cell = row_of * len(distinct) + column_of
        whole = len(cell) == len(rows) * len(distinct) and bool(
            (cell.diff() == 1).all()
        )
        of_distinct = columns(distinct)
        rows, cell = _beside(module, rows), _beside(module, cell)

        def grid_of(seen: Tensor) -> FromOutputGradient:
            a = of_distinct(seen).mT

            def from_grid(g: Tensor) -> Tensor:
                grid = (g[:, rows] @ a).flatten(1)
                return grid if whole else grid[:, cell]

            return from_grid

        return grid_of

    prepared: dict[int, list[tuple[Tensor, Columns]]] = {}

    def pairs_of(seen: Tensor) -> FromOutputGradient:
        kept: list[Tensor] = []

        def from_pairs(g: Tensor) -> Tensor:
            size = g[:, 0].numel()
            step = max(1, PAIRED_AT_A_TIME // max(1, size))
            if step not in prepared:
                parts = zip(m_rows.split(step), m_columns.split(step), strict=True)
                prepared[step] = [(_beside(module, o), columns(t)) for o, t in parts]
            if not kept and size * len(m_rows) <= PAIRED_KEPT:
                kept.extend(of_part(seen) for _, of_part in prepared[step])
            made = kept or (of_part(seen) for _, of_part in prepared[step])
            products = zip(prepared[step], made, strict=True)
            return torch.cat([(g[:, o] * a).sum(-1) for (o, _), a in products], dim=1)

        return from_pairs

    return pairs_of


def _beside(module: nn.Module, entries: Tensor) -> Tensor:
    """Entries where the module's weights are."""
    return entries.to(next(module.parameters()).device, non_blocking=True)


# Linear: ∂W[o, i] = Σ_p g[p, o]·a[p, i], ∂b[o] = Σ_p g[p, o]; p runs over all axes but
# the first and last.


def _positions_last(x: Tensor) -> Tensor:
    """(n, *, features) -> (n, features, p)."""
    return x.reshape(len(x), -1, x.shape[-1]).mT


def _linear_entries(module: nn.Linear, entries: Tensor) -> FromSeen:
    def columns(wanted: Tensor) -> Columns:
        places = _beside(module, wanted)
        return lambda a: a[:, places]

    width = module.weight.shape[1]
    gather = _gather(module, entries // width, entries % width, columns)

    def of_seen(a: Tensor) -> FromOutputGradient:
        rows = gather(_positions_last(a))
        return lambda g: rows(_positions_last(g))

    return of_seen


def _linear_squares(module: nn.Linear, a: Tensor) -> FromOutputGradient:
    squares = _squared_products(_positions_last(a).mT)
    return lambda g: squares(_positions_last(g))


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


def _conv_entries(module: Conv, entries: Tensor) -> FromSeen:
    n_taps = prod(module.kernel_size)
    out = entries // module.weight[0].numel()
    group = out // (module.out_channels // module.groups)
    channel = (
        group * (module.in_channels // module.groups)
        + entries % module.weight[0].numel() // n_taps
    )

    needed, place = channel.unique(return_inverse=True)
    few = None if len(needed) > module.in_channels // 2 else _beside(module, needed)
    if few is None:
        place = channel

    def columns(wanted: Tensor) -> Columns:
        of_taps = []  # tap, where its columns go, and the channels that they come from
        for tap in (wanted % n_taps).unique().tolist():
            here = (wanted % n_taps == tap).nonzero()[:, 0]
            channels = _beside(module, wanted[here] // n_taps)
            of_taps.append((tap, _beside(module, here), channels))

        def of_padded(a: Tensor) -> Tensor:
            windows = list(_windows(module, a))
            result = a.new_empty(len(a), len(wanted), a[0, 0][windows[0]].numel())
            for tap, here, channels in of_taps:
                result[:, here] = a[:, channels][windows[tap]].flatten(2)
            return result

        return of_padded

    # Columns are numbered by channel of what is taken of the input and tap.
    gather = _gather(module, out, place * n_taps + entries % n_taps, columns)

    def of_seen(a: Tensor) -> FromOutputGradient:
        rows = gather(_padded(module, a if few is None else a[:, few]))
        return lambda g: rows(_channels_first(g))

    return of_seen


def _conv_squares(module: Conv, a: Tensor) -> FromOutputGradient:
    a = _padded(module, a)
    windows = list(_windows(module, a))
    size = a[0, 0][windows[0]].shape
    columns = a.new_empty(*a.shape[:2], len(windows), *size)
    for tap, window in enumerate(windows):
        columns[:, :, tap] = a[window]
    columns = columns.reshape(len(a) * module.groups, -1, size.numel()).mT
    if module.groups == 1:
        of_one_group = _squared_products(columns)
        return lambda g: of_one_group(_channels_first(g))

    def squares(g: Tensor) -> Tensor:
        g = _channels_first(g)
        total = module.weight.new_zeros(module.weight.numel(), dtype=g.dtype)
        step = max(1, squared_at_a_time(g.device) // len(total)) * module.groups
        of_groups = g.reshape(len(g) * module.groups, -1, g.shape[-1])
        for part, seen in zip(of_groups.split(step), columns.split(step), strict=True):
            total += (part @ seen).square_().reshape(-1, len(total)).sum(0)
        return total

    return squares


def squared_at_a_time(device: torch.device) -> int:
    """How many numbers are held while they are squared."""
    return SQUARED_AT_A_TIME if device.type == "cpu" else SQUARED_ON_DEVICE


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
        step = max(1, squared_at_a_time(g.device) // (g.shape[1] * n_columns))
        total = g.new_zeros(g.shape[1], n_columns)
        for start in range(0, n, step):
            products = g[start : start + step] @ a[start : start + step]
            if step > MAX_LOOPED or a.device.type != "cpu":
                total += products.square_().sum(0)
            else:
                for gradient in products:  # large: read once, only the sum is written
                    total.addcmul_(gradient, gradient)
        return total

    return one_by_one


# Normalisation: ∂γ[c] = Σ_p g[c, p]·x̂[c, p], ∂β[c] = Σ_p g[c, p].


def _batch_norm(module: nn.BatchNorm2d, a: Tensor, channels: Any = ...) -> Tensor:
    assert module.running_mean is not None
    assert module.running_var is not None
    mean, variance = module.running_mean.to(a.dtype), module.running_var.to(a.dtype)
    if channels is not ...:
        a, mean, variance = a[:, channels], mean[channels], variance[channels]
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


def _scale_rule(normalized: Callable[..., Tensor]) -> Rule:
    def entries(module: Any, wanted: Tensor) -> FromSeen:
        places = _beside(module, wanted)

        def of_seen(a: Tensor) -> FromOutputGradient:
            if normalized is _batch_norm:  # channel by channel
                x = normalized(module, a, places)
            else:
                x = normalized(module, a)[:, places]
            return lambda g: (_by_feature(module, g)[:, places] * x).sum(-1)

        return of_seen

    def squares(module: Any, a: Tensor) -> FromOutputGradient:
        x = normalized(module, a)
        return lambda g: (_by_feature(module, g) * x).sum(-1).square().sum(0)

    return Rule(entries, squares)


def _by_feature(module: Any, g: Tensor) -> Tensor:
    if isinstance(module, nn.LayerNorm):
        return _normalized_last(module, g)
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return g.reshape(len(g), 1, -1)
    return _channels_first(g)


# PReLU: ∂w[c] = Σ_p g[c, p]·min(a[c, p], 0); torch.func cannot batch it.


def _negative_part(module: nn.PReLU, a: Tensor) -> Tensor:
    return _by_feature(module, a.clamp_max(0))


def _bias_rule(by_feature: Callable[[Any, Tensor], Tensor]) -> Rule:
    """∂b = Σ_p g, whatever the layer saw."""

    def entries(module: Any, wanted: Tensor) -> FromSeen:
        places = _beside(module, wanted)
        return lambda a: lambda g: by_feature(module, g)[:, places].sum(-1)

    return Rule(
        entries,
        squares=lambda module, a: (
            lambda g: by_feature(module, g).sum(-1).square().sum(0)
        ),
    )


# Embedding: ∂W[v, d] = Σ_p [token_p = v]·g[p, d]; the padding token learns nothing.


def _embedding_entries(
    module: nn.Embedding | nn.EmbeddingBag, entries: Tensor
) -> FromSeen:
    def columns(wanted: Tensor) -> Columns:
        learns = wanted != (-1 if module.padding_idx is None else module.padding_idx)
        token, learns = _beside(module, wanted), _beside(module, learns)

        def met(tokens: Tensor) -> Tensor:
            found = (tokens == token[:, None]) & learns[:, None]
            return found.to(module.weight.dtype)

        return met

    width = module.embedding_dim
    gather = _gather(module, entries % width, entries // width, columns)

    def of_seen(a: Tensor) -> FromOutputGradient:
        rows = gather(a.reshape(len(a), 1, -1))
        return lambda g: rows(_positions_last(g))

    return of_seen


def _embedding_squares(
    module: nn.Embedding | nn.EmbeddingBag, a: Tensor
) -> FromOutputGradient:
    # Equal tokens of a sample have one slot; nobody waits for how many there are.
    tokens, order = a.reshape(len(a), -1).sort(1)
    first = F.pad(tokens.diff(dim=1) != 0, (1, 0)).cumsum(1)
    n_slots = tokens.numel()
    first += torch.arange(0, n_slots, tokens.shape[1], device=a.device)[:, None]
    slot = torch.empty_like(order).scatter_(1, order, first).flatten()
    token = slot.new_zeros(n_slots).scatter_(0, first.flatten(), tokens.flatten())

    def squares(g: Tensor) -> Tensor:
        g = g.reshape(n_slots, -1)
        summed = g.new_zeros(g.shape).index_add_(0, slot, g)
        if module.padding_idx is not None:
            summed.masked_fill_((token == module.padding_idx)[:, None], 0)
        return g.new_zeros(module.num_embeddings, g.shape[1]).index_add_(
            0, token, summed.square_()
        )

    return squares


# EmbeddingBag of (n, tokens): every token has its share of the bag's gradient, and then
# the rule of Embedding. With weights of each token's own, or bags in a row with
# offsets, the shares are others: comparison tells, and they are vmapped.


def _bag_shares(module: nn.EmbeddingBag, tokens: Tensor) -> Tensor:
    """(n, tokens, 1), or one for each feature."""
    tokens = tokens.reshape(len(tokens), -1)
    padding = -1 if module.padding_idx is None else module.padding_idx
    learns = (tokens != padding)[..., None]
    if module.mode == "max":
        vectors = F.embedding(tokens, module.weight.detach())
        largest = vectors.masked_fill(~learns, -torch.inf).argmax(1, keepdim=True)
        return torch.zeros_like(vectors).scatter_(1, largest, 1)
    shares = learns.to(module.weight.dtype)
    if module.mode == "mean":
        shares = shares / shares.sum(1, keepdim=True).clamp_min(1)
    return shares


def _bag_entries(module: nn.EmbeddingBag, entries: Tensor) -> FromSeen:
    rule = _embedding_entries(module, entries)

    def of_seen(a: Tensor) -> FromOutputGradient:
        rows, shares = rule(a), _bag_shares(module, a)
        return lambda g: rows(shares * g[:, None])

    return of_seen


def _bag_squares(module: nn.EmbeddingBag, a: Tensor) -> FromOutputGradient:
    squares, shares = _embedding_squares(module, a), _bag_shares(module, a)
    return lambda g: squares(shares * g[:, None])


_CHANNEL_BIAS = _bias_rule(lambda module, g: _channels_first(g))
_RULES: tuple[tuple[tuple[type[nn.Module], ...], dict[str, Rule]], ...] = (
    (
        (nn.Linear,),
        {
            "weight": Rule(_linear_entries, _linear_squares),
            "bias": _bias_rule(lambda module, g: _positions_last(g)),
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
            "bias": _bias_rule(_by_feature),
        },
    ),
    ((nn.PReLU,), {"weight": _scale_rule(_negative_part)}),
    ((nn.Embedding,), {"weight": Rule(_embedding_entries, _embedding_squares)}),
    ((nn.EmbeddingBag,), {"weight": Rule(_bag_entries, _bag_squares)}),
)
