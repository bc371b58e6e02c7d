r"""Which parameters enter a batch's graph by the operation of their own layer alone.

Of such a parameter θ, with a what the layer saw and g (n, ...) the gradient at its
output, everything that autograd would give is in a and g:

.. math:: \partial_\theta = \sum_n f(a_n, g_n)

with the layer's own f, which its rule was tried on. Whether this is so can be read off
the graph: one edge leads to θ, and it starts at the operation whose result the layer
returned. Another use of θ, a change of it beforehand or of the result afterwards shows
as another edge or another node. What reads otherwise is compared in numbers.

This file sees torch modules and autograd's graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.autograd.graph import Node

# Layers of torch's own classes do what their rules say; a subclass may do anything.
KINDS = {
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm),
}
# What lies between such a layer's result and its parameters, and how deep.
OPERATIONS = {
    *("ConvolutionBackward0", "AddmmBackward0", "MmBackward0", "AddBackward0"),
    *("NativeBatchNormBackward0", "CudnnBatchNormBackward0"),
    *("NativeGroupNormBackward0", "NativeLayerNormBackward0"),
    *("TBackward0", "UnsafeViewBackward0", "ViewBackward0", "ToCopyBackward0"),
}
MAX_DEPTH = 5


def by_own_operation(
    logits: Tensor,
    parameters: Mapping[str, Tensor],
    ends: Iterable[tuple[str, nn.Module, Node]],
) -> list[str]:
    """Names of the parameters that one edge of the graph leads to, from their layer.

    Parameters
    ----------
    logits : Tensor of shape (n, c)
    parameters : mapping of name to Parameter
    ends : iterable of (name, module, node)
        Parameters, their layers, and where these layers' results come from.
    """
    n_uses: Counter[int] | None = None
    found = []
    for name, module, node in ends:
        if (
            type(module) not in KINDS
            or {"forward", "_conv_forward"} & vars(module).keys()
        ):
            continue
        n_uses = n_uses or _uses(logits)
        parameter = parameters[name]
        if n_uses[id(parameter)] == 1 and _leads_to(node, parameter, MAX_DEPTH):
            found.append(name)
    return found


def _uses(logits: Tensor) -> Counter[int]:
    """How many edges of the graph lead to each leaf, by its id."""
    found: Counter[int] = Counter()
    nodes = [] if logits.grad_fn is None else [logits.grad_fn]
    met = set(nodes)
    while nodes:
        for following, _ in nodes.pop().next_functions:
            if following is None:
                continue
            leaf = getattr(following, "variable", None)
            if leaf is not None:
                found[id(leaf)] += 1
            elif following not in met:
                met.add(following)
                nodes.append(following)
    return found


def _leads_to(node: Node, parameter: Tensor, depth: int) -> bool:
    """Whether operations of the layer alone lie between."""
    if getattr(node, "variable", None) is parameter:
        return True
    return (
        depth > 0
        and node.name() in OPERATIONS
        and any(
            _leads_to(following, parameter, depth - 1)
            for following, _ in node.next_functions
            if following is not None
        )
    )
