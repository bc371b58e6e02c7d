"""How many weights of each layer a mask keeps; see `fishermask_sk.plotting`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fishermask_sk.plotting.axes import COLORS, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import nn

    from fishermask_sk.strategy.fisher_mask import FisherMask


class MaskDisplay:
    """How many weights of each layer the mask keeps, in the order of the network.

    Parameters
    ----------
    weights_per_layer : mapping of str to int
        Number of weights kept of each parameter, as ``FisherMask.weights_per_layer_``
        has them.
    layer_sizes : mapping of str to int, default=None
        Number of weights of each parameter; where given, each bar names the share that
        is kept.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    bars_ : matplotlib BarContainer

    Examples
    --------
    >>> from fishermask_sk.plotting import MaskDisplay
    >>> kept = {"conv.weight": 3, "head.weight": 20}
    >>> display = MaskDisplay(kept, {"conv.weight": 144, "head.weight": 20})
    >>> [label.get_text() for label in display.plot().ax_.texts]
    ['3 (2.08%)', '20 (100%)']
    """

    def __init__(
        self,
        weights_per_layer: Mapping[str, int],
        layer_sizes: Mapping[str, int] | None = None,
    ) -> None:
        self.weights_per_layer = weights_per_layer
        self.layer_sizes = layer_sizes

    @classmethod
    def from_strategy(
        cls, strategy: FisherMask, *, module: nn.Module | None = None
    ) -> MaskDisplay:
        """Take the counts from a FisherMask that has been called.

        Parameters
        ----------
        strategy : FisherMask
            With `weights_per_layer_`.
        module : torch.nn.Module, default=None
            The module that was queried; gives the sizes of its layers.

        Returns
        -------
        MaskDisplay

        Raises
        ------
        ValueError
            For a strategy that has not been called.
        """
        counts = getattr(strategy, "weights_per_layer_", None)
        if counts is None:
            raise ValueError(
                f"{type(strategy).__name__} has no weights_per_layer_; run a query "
                "with it first."
            )
        if module is None:
            return cls(counts)
        # A compiled module puts this in front of the names that it was written with.
        sizes = {
            name.removeprefix("_orig_mod."): p.numel()
            for name, p in module.named_parameters()
        }
        return cls(counts, sizes)

    def plot(self, ax: Axes | None = None, *, empty: bool = False) -> MaskDisplay:
        """Draw one horizontal bar per layer, the first layer on top.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; a new figure for None.
        empty : bool, default=False
            Whether layers of which nothing is kept are drawn as well.

        Returns
        -------
        self : MaskDisplay

        Raises
        ------
        ValueError
            For a layer whose size is not given, or a mask that keeps nothing.
        """
        counts = {
            name: int(n) for name, n in self.weights_per_layer.items() if n or empty
        }
        if not counts:
            raise ValueError(
                "weights_per_layer keeps no weight; expected at least one count above "
                "0."
            )
        labels = [f"{n:,}" for n in counts.values()]
        if self.layer_sizes is not None:
            unknown = [name for name in counts if name not in self.layer_sizes]
            if unknown:
                raise ValueError(
                    f"layer_sizes lacks {unknown[0]!r}; give the size of every layer "
                    "in weights_per_layer."
                )
            shares = [100 * n / self.layer_sizes[name] for name, n in counts.items()]
            labels = [
                f"{label} ({share:.3g}%)"
                for label, share in zip(labels, shares, strict=True)
            ]
        self.ax_ = new_axes(ax, figsize=(6.4, 0.8 + 0.22 * len(counts)))
        self.figure_ = self.ax_.figure
        self.bars_ = self.ax_.barh(list(counts), list(counts.values()), color=COLORS[0])
        self.ax_.bar_label(self.bars_, labels, padding=3, fontsize=8)
        self.ax_.invert_yaxis()
        self.ax_.margins(x=0.18, y=0.02)
        self.ax_.set_xlabel("weights kept")
        self.ax_.tick_params(axis="y", labelsize=8)
        self.ax_.spines[["top", "right"]].set_visible(False)
        return self
