r"""What a batch's graph shows of its parameters: that each is used by the operation of
its own layer alone, and that the samples stay in order.

Of such a parameter θ, with a what the layer saw and g (n, ...) the gradient at its
output, everything that autograd would give is in a and g:

.. math:: \partial_\theta = \sum_n f(a_n, g_n)

with the layer's own f, which its rule was tried on. Whether this is so can be read off
the graph: one edge leads to θ, and it starts at the operation whose result the layer
returned. Another use of θ, a change of it beforehand or of the result afterwards shows
as another edge or another node. What reads otherwise is compared in numbers.

A net that sorts its batch, or sends samples different ways, has to put them together
again, by an operation that takes positions. Where there is none of these between θ and
the scores, samples may be moved, but not some of them for what they hold.

This file sees torch modules and autograd's graph.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn
from torch.autograd.graph import Node

# Layers of torch's own classes do what their rules say; a subclass may do anything.
KINDS = {
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.PReLU),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm),
    nn.EmbeddingBag,
}
# What lies between such a layer's result and its parameters, and how deep.
OWN = {
    *("Convolution", "Addmm", "Mm", "Add", "Embedding", "EmbeddingBag"),
    *("NativeBatchNorm", "CudnnBatchNorm", "NativeGroupNorm", "NativeLayerNorm"),
    *("PreluKernel", "T", "UnsafeView", "View", "ToCopy"),
}
MAX_DEPTH = 5
# Operations that do the same whatever the samples hold.
STEADY = OWN | {
    *("Sub", "Mul", "Div", "Neg", "Pow", "Exp", "Log", "Sqrt", "Rsqrt", "Abs", "Sign"),
    *("Clamp", "ClampMin", "ClampMax", "Relu", "LeakyRelu", "Elu", "Gelu", "Silu"),
    *("Mish", "Hardswish", "Hardsigmoid", "Hardtanh", "Sigmoid", "LogSigmoid", "Tanh"),
    *("Softplus", "Threshold", "Softmax", "LogSoftmax", "MaskedFill", "Where", "Bmm"),
    *("Mean", "Sum", "Var", "Amax", "Amin", "Max", "LinalgVectorNorm"),
    *("ScaledDotProductFlashAttention", "ScaledDotProductFlashAttentionForCpu"),
    *("ScaledDotProductEfficientAttention", "ScaledDotProductCudnnAttention"),
    *("AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D"),
    *("MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D"),
    *("ConstantPadNd", "UpsampleNearest2D", "UpsampleBilinear2D", "PixelShuffle"),
    *("Permute", "Transpose", "ReshapeAlias", "AsStrided", "Expand", "Repeat"),
    *("Squeeze", "Unsqueeze", "Clone", "Alias", "Select", "Slice", "Split"),
    *("SplitWithSizes", "UnsafeSplit", "Unbind"),
}
# These join parts, along another axis than the first.
JOINING = {"Cat", "Stack"}
PRODUCTS = {"Mm", "Addmm", "Bmm"}


class Seen(NamedTuple):
    """A parameter of a layer, and where in the graph the layer's result comes from."""

    parameter: Tensor
    layer: nn.Module
    node: Node


class Graph:
    """What the graph of a batch's scores shows.

    Parameters
    ----------
    logits : Tensor of shape (n, c)

    Attributes
    ----------
    in_order : bool
        Whether nothing moves some samples for what they hold.
    """

    def __init__(self, logits: Tensor) -> None:
        self.in_order = True
        self._uses: Counter[int] = Counter()  # edges that lead to a leaf, by its id
        nodes = [] if logits.grad_fn is None else [logits.grad_fn]
        met = set(nodes)
        while nodes:
            node = nodes.pop()
            self.in_order = self.in_order and _is_steady(node)
            for following, _ in node.next_functions:
                if following is None:
                    continue
                leaf = getattr(following, "variable", None)
                if leaf is not None:
                    self._uses[id(leaf)] += 1
                elif following not in met:
                    met.add(following)
                    nodes.append(following)

    def vouches(self, used: Iterable[Seen], unused: Iterable[Tensor]) -> bool:
        """Whether each of these parameters has one use, that of its layer, or none.

        That there is none is believed where no operation is unknown.
        """
        unused = list(unused)
        if unused and (not self.in_order or any(self._uses[id(p)] for p in unused)):
            return False
        return all(
            type(layer) in KINDS
            and not parameter._backward_hooks
            and not {"forward", "_conv_forward"} & vars(layer).keys()
            and self._uses[id(parameter)] == 1
            and _leads_to(node, parameter, MAX_DEPTH)
            for parameter, layer, node in used
        )


def _operation(node: Node) -> str:
    """Its name without what autograd adds."""
    return re.sub(r"Backward\d*$", "", node.name())


def _is_steady(node: Node) -> bool:
    operation = _operation(node)
    if operation in JOINING:
        return bool(node._saved_dim != 0)  # type: ignore[attr-defined]
    if operation in PRODUCTS:
        (left, _), (right, _) = node.next_functions[-2:]
        if left is None and right is not None and not _is_weight(right):
            return False  # a constant from the left, which may be a permutation
    return operation in STEADY


def _is_weight(node: Node) -> bool:
    """Whether this is a leaf, or changes one into another view or dtype."""
    while _operation(node) in {"T", "ToCopy"}:
        (following, _), *_ = node.next_functions
        if following is None:
            return False
        node = following
    return hasattr(node, "variable")


def is_result_of(logits: Tensor, parameter: Tensor) -> bool:
    """Whether nothing unknown lies between a layer's parameter and these scores, no
    hook that is seen on either among it.
    """
    node = logits.grad_fn
    hooked = logits._backward_hooks or parameter._backward_hooks
    while not hooked and node is not None and _operation(node) in STEADY:
        if _leads_to(node, parameter, MAX_DEPTH):
            return True
        node = node.next_functions[0][0]
    return False


def _leads_to(node: Node, parameter: Tensor, depth: int) -> bool:
    """Whether operations of the layer alone lie between."""
    if getattr(node, "variable", None) is parameter:
        return True
    return (
        depth > 0
        and _operation(node) in OWN
        and any(
            _leads_to(following, parameter, depth - 1)
            for following, _ in node.next_functions
            if following is not None
        )
    )
