"""Whole queries on digits, for asv: seconds, peak memory, and what the picks gain."""

import torch

from fishermask_sk import FisherMask, ResNet18Classifier
from fishermask_sk.baselines import badge_sampling, bait_sampling, margin_sampling
from fishermask_sk.datasets import load_images

N_LABELED, N_POOL, N_PICKS = 100, 600, 20
STRATEGIES = {
    "all layers": FisherMask(random_state=0),
    "last layer": FisherMask(layers="last", random_state=0),
    "two stages": FisherMask(candidates=5, n_information_samples=200, random_state=0),
}
BASELINES = {"margin": margin_sampling, "BADGE": badge_sampling, "BAIT": bait_sampling}


class _NarrowNet:
    """A ResNet-18 of width 16, and what each strategy is asked."""

    param_names = ("strategy",)
    timeout = 600

    def setup(self, strategy):
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        digits = load_images("digits", random_state=0)
        self.X_labeled, y = digits.X_train[:N_LABELED], digits.y_train[:N_LABELED]
        self.X_pool = digits.X_train[N_LABELED:][:N_POOL]
        net = ResNet18Classifier(
            16, head_bias=False, classes=range(10), min_steps=30, random_state=0
        )
        self.net = net.fit(self.X_labeled, y)


class Query(_NarrowNet):
    """FisherMask."""

    params = tuple(STRATEGIES)

    def select(self, strategy):
        STRATEGIES[strategy].select(
            self.net, self.X_pool, N_PICKS, X_labeled=self.X_labeled
        )

    def time_select(self, strategy):
        self.select(strategy)

    def peakmem_select(self, strategy):
        self.select(strategy)

    def track_gain(self, strategy):
        """Sum of the trace reductions: a change of picks shows here."""
        self.select(strategy)
        return float(STRATEGIES[strategy].trace_reductions_.sum())


class Baseline(_NarrowNet):
    """The strategies that FisherMask has to be worth its seconds against."""

    params = tuple(BASELINES)

    def time_select(self, strategy):
        options = {"X_labeled": self.X_labeled} if strategy == "BAIT" else {}
        BASELINES[strategy](self.net, self.X_pool, N_PICKS, **options)
