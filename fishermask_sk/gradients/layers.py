"""Which layers a network has, in the order of their use: its head, its stem, and who
may be masked.

This file sees torch modules; nothing here depends on the names that their authors
chose.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.utils import parametrize


class Layout(NamedTuple):
    """Parameter names of the head (empty where there is none) and of the stem, in a
    network's own order.
    """

    head: tuple[str, ...]
    stem: tuple[str, ...]


def find_layout(
    module: nn.Module,
    run: Callable[[], Tensor],
    n_outputs: int,
    head: str | None = None,
) -> Layout:
    """Find head and stem by one forward pass.

    The *head* is the layer nearest the output, in the graph, whose output dimension is
    the number of class scores; a bare parameter (C, d) or (d, C) that a network
    multiplies with by itself counts as a layer. The *stem* are the layers with
    parameters whose input depends on no other parameter; the bare parameters of a
    module that calls other layers (class tokens, position embeddings, layer scale) are
    never of them.

    Parameters
    ----------
    module : Module
        In evaluation mode (see `fishermask_sk.gradients.modules.undisturbed`).
    run : callable -> class scores of shape (n, n_outputs), from a forward pass of
    `module`
    n_outputs : int
    head : str, optional
        Name of the head's module, or of a parameter, instead of the rule.

    Returns
    -------
    Layout

    Raises
    ------
    ValueError
        Where `head` names neither a module with parameters nor a parameter.

    Examples
    --------
    >>> net = nn.Sequential(
    ...     nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    ... )
    >>> find_layout(net, lambda: net(torch.zeros(2, 4)), n_outputs=3)
    Layout(head=('4.weight', '4.bias'), stem=('0.weight', '0.bias'))
    """
    names = {id(p): name for name, p in module.named_parameters()}
    own = {m: [names[id(p)] for p in _own_parameters(m)] for m in _layers(module)}
    owners = {m: parameters for m, parameters in own.items() if parameters}
    if head is not None:
        return Layout(_named_head(module, head, names), _stem(owners, module, run)[0])
    stem, scores, outputs = _stem(owners, module, run)
    ends = {
        m: node for m, (shape, node) in outputs.items() if _ends_in(shape, n_outputs)
    }
    bare = {
        p: m
        for m in owners
        if m not in outputs or holds_layers(m)
        for p in _own_parameters(m)
        if p.ndim == 2 and n_outputs in p.shape
    }
    return Layout(_nearest(scores, ends, bare, n_outputs, names), stem)


def candidate_names(
    layers: str | Sequence[str], layout: Layout, trainable: Iterable[str]
) -> list[str]:
    """Names of the trainable parameters that a mask may touch.

    Parameters
    ----------
    layers : {"all", "last", "middle"}, or fnmatch pattern(s) on parameter names
    layout : Layout
    trainable : iterable of str

    Returns
    -------
    list of str, in the network's order; never empty

    Raises
    ------
    ValueError
        Where a pattern matches nothing, there is no head, or no trainable weight is
        left.

    Examples
    --------
    >>> names = ["conv.weight", "conv.bias", "fc.weight", "fc.bias"]
    >>> candidate_names("*.bias", Layout((), ()), names)
    ['conv.bias', 'fc.bias']
    """
    trainable = list(trainable)
    if layers == "all":
        chosen = trainable
    elif layers == "last":
        if not layout.head:
            raise ValueError(
                "layers='last' needs the head, and no layer's output dimension is the "
                "number of classes; name it with head='...'."
            )
        chosen = [name for name in trainable if name in layout.head]
    elif layers == "middle":
        chosen = [
            name
            for name in trainable
            if name not in layout.head and name not in layout.stem
        ]
    else:
        patterns = [layers] if isinstance(layers, str) else list(layers)
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in trainable):
                raise ValueError(
                    f"layers={layers!r}: {pattern!r} matches none of the trainable "
                    "parameters. Use 'all', 'last', 'middle' or patterns for these "
                    f"names: {', '.join(trainable)}."
                )
        chosen = [
            name
            for name in trainable
            if any(fnmatchcase(name, pattern) for pattern in patterns)
        ]
    if not chosen:
        raise ValueError(
            f"layers={layers!r} leaves no trainable weight to mask: the head is "
            f"{list(layout.head)}, the stem {list(layout.stem)}, and trainable are "
            f"{trainable}. Choose other layers or unfreeze weights."
        )
    return chosen


def _named_head(module: nn.Module, head: str, names: dict[int, str]) -> tuple[str, ...]:
    modules = dict(module.named_modules())
    if head in names.values():
        return (head,)
    if head not in modules or not any(True for _ in modules[head].parameters()):
        known = [
            name
            for name, m in modules.items()
            if name and any(True for _ in m.parameters())
        ]
        raise ValueError(
            f"head={head!r} names no module with parameters and no parameter; there "
            f"are {', '.join(known or names.values())}."
        )
    return tuple(names[id(p)] for p in modules[head].parameters())


Outputs = dict[nn.Module, tuple[torch.Size, Node]]


def _layers(module: nn.Module) -> list[nn.Module]:
    """All modules but those inside a parametrization, whose parameters are those of the
    layer around them.
    """
    inside = {
        id(part)
        for m in module.modules()
        if parametrize.is_parametrized(m)
        for part in m.parametrizations.modules()  # type: ignore[union-attr]
    }
    return [m for m in module.modules() if id(m) not in inside]


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    own = list(module.parameters(recurse=False))
    if parametrize.is_parametrized(module):
        own += module.parametrizations.parameters()  # type: ignore[union-attr]
    return own


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a call's arguments; a PackedSequence is a tuple as well."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _stem(
    owners: dict[nn.Module, list[str]], module: nn.Module, run: Callable[[], Tensor]
) -> tuple[tuple[str, ...], Tensor, Outputs]:
    """Run once; see whose input needs no gradient, and where in the graph each layer's
    output lies.
    """
    sees_input: dict[nn.Module, bool] = {}
    outputs: Outputs = {}

    # A replica of a layer has its hooks, and is no layer of the module: what was called
    # is not asked.
    def before(
        m: nn.Module, called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        sees_input.setdefault(
            m, not any(v.requires_grad for v in _tensors((args, kwargs)))
        )

    def after(
        m: nn.Module,
        called: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            outputs[m] = (output.shape, get_gradient_edge(output).node)

    handles = [
        m.register_forward_pre_hook(partial(before, m), with_kwargs=True)
        for m in owners
    ]
    handles += [
        m.register_forward_hook(partial(after, m), with_kwargs=True) for m in owners
    ]
    needs_grad = [(p, p.requires_grad) for p in module.parameters()]
    try:
        for p in module.parameters():
            if p.is_floating_point():
                p.requires_grad_(
                    True
                )  # frozen layers count when asking who comes first
        with torch.enable_grad():
            scores = run()
    finally:
        for handle in handles:
            handle.remove()
        for p, needed in needs_grad:
            p.requires_grad_(needed)
    first = {
        name
        for m, sees in sees_input.items()
        if sees
        and not any(inner in sees_input for inner in m.modules() if inner is not m)
        for name in owners[m]
    }
    return (
        tuple(name for name, _ in module.named_parameters() if name in first),
        scores,
        outputs,
    )


def _ends_in(shape: torch.Size, n_outputs: int) -> bool:
    return len(shape) >= 2 and n_outputs in (shape[-1], shape[1])


def _nearest(
    scores: Tensor,
    places: dict[nn.Module, Node],
    bare: dict[nn.Parameter, nn.Module],
    n_outputs: int,
    names: dict[int, str],
) -> tuple[str, ...]:
    """Parameters of the layer whose output, or of the bare parameter, that is met first
    on the way back.
    """
    at = {node: m for m, node in places.items() if not holds_layers(m)}
    if scores.grad_fn is None:
        return ()
    queue, met = deque([scores.grad_fn]), {scores.grad_fn}
    while queue:
        node = queue.popleft()
        if node in at:
            return tuple(names[id(p)] for p in at[node].parameters())
        weight = getattr(node, "variable", None)
        if weight is not None and weight in bare:
            own = _own_parameters(bare[weight])
            return tuple(
                names[id(p)] for p in own if p is weight or p.shape == (n_outputs,)
            )
        for following, _ in node.next_functions:
            if following is not None and following not in met:
                met.add(following)
                queue.append(following)
    return ()


def holds_layers(module: nn.Module) -> bool:
    """Whether other layers with parameters lie inside: a network that owns a class
    token is no head.
    """
    return any(
        name != "parametrizations" and any(True for _ in child.parameters())
        for name, child in module.named_children()
    )
