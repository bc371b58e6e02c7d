"""The displays draw what they were given: values of lines, bands, bars and titles are
read back.
"""

import sys
from types import MappingProxyType, SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from skorch.helper import SliceDataset
from torch.utils.data import TensorDataset

from fishermask_sk.loops.results import ComparisonResults
from fishermask_sk.plotting import LearningCurveDisplay, MaskDisplay, QueryDisplay

N_LABELS = np.array([20, 40, 60])
SCORES = {
    "FisherMask": np.array(
        [[0.5, 0.6, 0.4], [0.7, 0.7, 0.7], [0.9, 0.8, 0.7]]
    ),  # rounds x seeds
    "margin": np.array([[0.5, 0.6, 0.4], [0.6, 0.8, 0.4], [0.8, 0.8, 0.8]]),
}


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture
def rows():
    tidy = [
        {
            "strategy": name,
            "seed": seed,
            "round": i,
            "n_labels": n,
            "accuracy": scores[i, seed],
        }
        for name, scores in SCORES.items()
        for seed in range(3)
        for i, n in enumerate(N_LABELS)
    ]
    # Results written by several processes arrive in any order.
    return [tidy[i] for i in np.random.default_rng(0).permutation(len(tidy))]


def band_edges(display, name):
    """Lower and upper edge of a drawn band, by x."""
    vertices = display.bands_[name].get_paths()[0].vertices
    edges = {x: vertices[vertices[:, 0] == x, 1] for x in N_LABELS}
    return np.array([[y.min(), y.max()] for y in edges.values()]).T


class TestLearningCurveDisplay:
    @pytest.mark.parametrize(
        "as_given",
        [list, pd.DataFrame, lambda rows: {k: [r[k] for r in rows] for k in rows[0]}],
        ids=["rows", "DataFrame", "columns"],
    )
    def test_lines_are_means_over_seeds(self, rows, as_given):
        display = LearningCurveDisplay.from_results(as_given(rows)).plot()
        assert set(display.lines_) == set(SCORES)
        for name, line in display.lines_.items():
            np.testing.assert_array_equal(line.get_xdata(), N_LABELS)
            np.testing.assert_allclose(line.get_ydata(), SCORES[name].mean(axis=1))
        assert display.ax_.get_xlabel() == "labels"
        assert display.ax_.get_ylabel() == "accuracy"

    @pytest.mark.parametrize(
        ("band", "edges"),
        [
            (
                "se",
                lambda s: s.mean(1) + np.outer([-1, 1], s.std(1, ddof=1) / np.sqrt(3)),
            ),
            ("std", lambda s: s.mean(1) + np.outer([-1, 1], s.std(1, ddof=1))),
            ("range", lambda s: np.stack([s.min(1), s.max(1)])),
        ],
    )
    def test_band_is_what_the_legend_says(self, rows, band, edges):
        display = LearningCurveDisplay.from_results(rows).plot(band=band)
        for name, scores in SCORES.items():
            np.testing.assert_allclose(band_edges(display, name), edges(scores))
        words = {
            "se": "±1 standard error",
            "std": "±1 standard deviation",
            "range": "lowest to highest",
        }
        assert (
            display.ax_.get_legend().get_title().get_text()
            == f"mean of 3 seeds, {words[band]}"
        )

    def test_no_band(self, rows):
        display = LearningCurveDisplay.from_results(rows).plot(band=None)
        assert display.bands_ == {}
        assert not display.ax_.collections
        assert display.ax_.get_legend().get_title().get_text() == "mean of 3 seeds"

    def test_other_columns_and_axes(self, rows):
        for row in rows:
            row["log_loss"] = 1 - row["accuracy"]
        _, ax = plt.subplots()
        display = LearningCurveDisplay.from_results(rows, x="round", metric="log_loss")
        assert display.plot(ax) is display
        assert display.ax_ is ax
        assert display.figure_ is ax.figure
        np.testing.assert_allclose(
            display.lines_["margin"].get_ydata(), 1 - SCORES["margin"].mean(1)
        )
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("round", "log loss")

    def test_an_unfinished_seed_counts_where_it_has_a_score(self, rows):
        for row in rows:
            if (
                row["strategy"] == "margin"
                and row["seed"] == 2
                and row["n_labels"] == 60
            ):
                row["accuracy"] = np.nan
        rows = [
            r
            for r in rows
            if (r["strategy"], r["seed"], r["n_labels"]) != ("margin", 2, 40)
        ]
        display = LearningCurveDisplay.from_results(rows).plot(band="se")
        np.testing.assert_allclose(
            display.lines_["margin"].get_ydata(), [0.5, 0.7, 0.8]
        )
        spread = np.std([0.6, 0.8], ddof=1) / np.sqrt(2)
        np.testing.assert_allclose(
            band_edges(display, "margin")[:, 1], [0.7 - spread, 0.7 + spread]
        )

    def test_one_seed_has_a_band_without_height(self, rows):
        display = LearningCurveDisplay.from_results(
            [r for r in rows if r["seed"] == 0]
        ).plot()
        np.testing.assert_allclose(
            band_edges(display, "margin"), np.tile(SCORES["margin"][:, 0], (2, 1))
        )
        assert (
            display.ax_.get_legend().get_title().get_text()
            == "mean of 1 seed, ±1 standard error"
        )

    def test_curves_differ_without_colour(self):
        curves = {f"strategy {i}": (N_LABELS, SCORES["margin"] + i) for i in range(9)}
        lines = LearningCurveDisplay(curves).plot().lines_.values()
        assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == 9

    def test_missing_column(self, rows):
        with pytest.raises(
            ValueError, match=r"no column 'f1', only \['accuracy', .*every row needs \["
        ):
            LearningCurveDisplay.from_results(rows, metric="f1")

    @pytest.mark.parametrize(
        "empty", [[], {"strategy": [], "seed": [], "n_labels": [], "accuracy": []}]
    )
    def test_no_rows(self, empty):
        with pytest.raises(
            ValueError, match="results are empty; expected at least one row"
        ):
            LearningCurveDisplay.from_results(empty)

    def test_twice_the_same_point(self, rows):
        with pytest.raises(
            ValueError,
            match="2 rows for strategy 'margin', seed 1 and n_labels=40; keep one",
        ):
            LearningCurveDisplay.from_results(
                [
                    *rows,
                    {"strategy": "margin", "seed": 1, "n_labels": 40, "accuracy": 0.1},
                ]
            )

    def test_labels_saved(self):
        curves = {
            "first": (N_LABELS, np.array([[0.1], [0.7], [0.8]])),
            "second": (N_LABELS, np.array([[0.1], [0.3], [0.7]])),
        }
        display = LearningCurveDisplay(curves).plot(labels_saved=("first", "second"))
        assert display.labels_saved_ == pytest.approx(20)
        assert display.ax_.texts[-1].get_text() == (
            "first: 20 labels\nfewer than second"
        )
        display = LearningCurveDisplay(curves).plot(labels_saved=("second", "first"))
        assert display.ax_.texts[-1].get_text() == "second: 20 labels\nmore than first"
        losses = {name: (x, -scores) for name, (x, scores) in curves.items()}
        display = LearningCurveDisplay(losses, metric="log_loss").plot(
            labels_saved=("first", "second")
        )
        assert display.labels_saved_ == pytest.approx(20)

    @pytest.mark.parametrize("metric", ["accuracy", "log_loss"])
    def test_labels_saved_is_the_number_of_the_table(self, metric):
        rng = np.random.default_rng(0)
        rows = [
            {
                "strategy": name,
                "seed": seed,
                "round": i,
                "n_labels": 10 + 20 * i,
                metric: lead + 0.1 * i + rng.normal(scale=0.05),
            }
            for name, lead in {"random": 0.5, "FisherMask": 0.6}.items()
            for seed in range(6)
            for i in range(5 if (name, seed) != ("random", 3) else 3)
        ]
        (row,) = (
            row
            for row in ComparisonResults(rows).summary("random", metric=metric)
            if row["strategy"] == "FisherMask"
        )
        assert row["n_seeds"] == 5  # one is not finished
        display = LearningCurveDisplay.from_results(rows, metric=metric)
        display.plot(labels_saved=("FisherMask", "random"))
        assert display.labels_saved_ == pytest.approx(row["labels_saved"])
        (arrow,) = (text for text in display.ax_.texts if text.arrow_patch is not None)
        assert arrow.xyann[0] - arrow.xy[0] == pytest.approx(row["labels_saved"])

    def test_labels_saved_without_a_whole_seed(self):
        curves = {
            "first": (N_LABELS, np.array([[0.1, 0.2], [0.7, np.nan], [0.8, np.nan]])),
            "second": (N_LABELS, np.array([[np.nan, 0.1], [0.3, 0.3], [0.7, 0.7]])),
        }
        with pytest.raises(
            ValueError,
            match="No seed has all 3 rounds of both 'first' and 'second'; finish the",
        ):
            LearningCurveDisplay(curves).plot(labels_saved=("first", "second"))

    def test_a_strategy_keeps_its_colour(self):
        curves = dict.fromkeys(
            ("mine", "random", "FisherMask", "margin", "other"),
            (N_LABELS, SCORES["margin"]),
        )
        lines = LearningCurveDisplay(curves).plot().lines_
        alone = LearningCurveDisplay({"random": curves["random"]}).plot().lines_
        assert alone["random"].get_color() == lines["random"].get_color()
        assert len({line.get_color() for line in lines.values()}) == 5

    def test_highlight_greys_the_others(self, rows):
        display = LearningCurveDisplay.from_results(rows).plot(highlight=["margin"])
        colours = {name: line.get_color() for name, line in display.lines_.items()}
        assert len(set(colours.values())) == 2
        assert list(display.bands_) == ["margin"]
        with pytest.raises(
            ValueError, match=r"highlight names 'BAIT', which is not among .*'margin'"
        ):
            display.plot(highlight=["BAIT"])

    def test_labels_saved_of_an_unknown_strategy(self, rows):
        with pytest.raises(
            ValueError, match=r"labels_saved names 'BAIT', .* strategies \[.*'margin'"
        ):
            LearningCurveDisplay.from_results(rows).plot(
                labels_saved=("BAIT", "margin")
            )

    def test_labels_saved_over_rounds(self, rows):
        with pytest.raises(
            ValueError,
            match="labels_saved needs labels on the horizontal axis, got x='round'",
        ):
            LearningCurveDisplay.from_results(rows, x="round").plot(
                labels_saved=("FisherMask", "margin")
            )

    def test_unknown_band(self, rows):
        with pytest.raises(ValueError, match="band='sem' is unknown; choose one of"):
            LearningCurveDisplay.from_results(rows).plot(band="sem")


class TestQueryDisplay:
    images = np.random.default_rng(0).random((5, 1, 6, 4)).astype(np.float32)
    query_idx = np.array([4, 0, 3])

    def test_titles_and_images_in_pick_order(self):
        strategy = SimpleNamespace(
            query_idx_=self.query_idx, trace_reductions_=np.array([0.5, 0.25, 0.12345])
        )
        learner = SimpleNamespace(predict=lambda X: np.array([1, 0, 1]))
        y_pool = np.array([0, 0, 0, 1, 1])
        display = QueryDisplay.from_strategy(
            strategy,
            self.images,
            estimator=learner,
            y_pool=y_pool,
            classes=["cat", "dog"],
        )
        assert display.plot() is display
        assert [ax.get_title() for ax in display.axes_] == [
            "guess dog\nis dog\ngain 0.5",
            "guess cat\nis cat\ngain 0.25",
            "guess dog\nis dog\ngain 0.123",
        ]
        for ax, i in zip(display.axes_, self.query_idx, strict=True):
            np.testing.assert_array_equal(ax.images[0].get_array(), self.images[i, 0])

    def test_wrong_guesses_have_a_thick_frame(self):
        display = QueryDisplay(
            self.images[:2], [0, 1], y_pred=["a", "b"], y_true=["a", "a"]
        ).plot()
        right, wrong = (ax.spines["left"].get_linewidth() for ax in display.axes_)
        assert wrong > 2 * right

    def test_nothing_known_shows_the_position_in_the_pool(self):
        display = QueryDisplay(self.images[self.query_idx], self.query_idx).plot()
        assert [ax.get_title() for ax in display.axes_] == ["#4", "#0", "#3"]

    def test_grid_inside_given_axes(self):
        _, (left, right) = plt.subplots(1, 2)
        display = QueryDisplay(self.images, np.arange(5)).plot(
            right, n_columns=2, max_images=3
        )
        assert display.ax_ is right
        assert len(display.axes_) == 3
        bounds = right.get_position()
        for ax in display.axes_:
            assert ax.get_position().x0 >= bounds.x0 > left.get_position().x1
        assert display.axes_[2].get_position().y1 < display.axes_[0].get_position().y0

    @pytest.mark.parametrize(
        ("image", "drawn"),
        [
            (np.arange(6.0).reshape(2, 3), np.arange(6.0).reshape(2, 3)),
            (np.full((3, 2, 2), 7, np.uint8), np.full((2, 2, 3), 7, np.uint8)),
            (
                np.stack([np.full((2, 2), v) for v in (-1.0, 0.0, 3.0)]),
                np.tile([0, 0.25, 1], (2, 2, 1)),
            ),
            (torch.full((1, 2, 2), 0.5), np.full((2, 2), 0.5)),
        ],
        ids=["height-width", "bytes", "normalised", "tensor"],
    )
    def test_kinds_of_image(self, image, drawn):
        (ax,) = QueryDisplay([image], [0]).plot().axes_
        np.testing.assert_allclose(ax.images[0].get_array(), drawn)

    def test_not_an_image(self):
        with pytest.raises(
            ValueError,
            match=r"shape \(2, 6, 4\) cannot be drawn; "
            r"expected \(height, width\).*plot_gains",
        ):
            QueryDisplay(np.zeros((1, 2, 6, 4)), [0]).plot()

    def test_constant_normalised_image(self):
        (ax,) = QueryDisplay(np.full((1, 3, 2, 2), -1.0), [0]).plot().axes_
        np.testing.assert_array_equal(ax.images[0].get_array(), 0)

    @pytest.mark.parametrize("name", ["images", "trace_reductions", "y_pred", "y_true"])
    def test_wrong_length(self, name):
        arguments = {"images": self.images, "query_idx": np.arange(5)} | {
            name: self.images[:2]
        }
        with pytest.raises(
            ValueError,
            match=rf"{name} has 2 entries for 5 picks; .*{name}\[query_idx\]",
        ):
            QueryDisplay(**arguments).plot()

    def test_no_picks(self):
        with pytest.raises(ValueError, match="no picks to draw; query_idx is empty"):
            QueryDisplay(self.images[:0], []).plot()

    def test_strategy_before_its_query(self):
        with pytest.raises(
            ValueError, match="SimpleNamespace has no query_idx_; run a query"
        ):
            QueryDisplay.from_strategy(SimpleNamespace(), self.images)

    @pytest.mark.parametrize(
        "wrapped",
        [TensorDataset, lambda *tensors: SliceDataset(TensorDataset(*tensors))],
    )
    def test_picks_of_a_dataset(self, wrapped):
        pool = wrapped(torch.tensor(self.images), torch.arange(5))
        strategy = SimpleNamespace(query_idx_=self.query_idx)
        display = QueryDisplay.from_strategy(
            strategy, pool, y_pool=list("abcde")
        ).plot()
        assert [ax.get_title() for ax in display.axes_] == ["is e", "is a", "is d"]
        for ax, i in zip(display.axes_, self.query_idx, strict=True):
            np.testing.assert_array_equal(ax.images[0].get_array(), self.images[i, 0])

    def test_gains_and_the_share_reached_after_each_pick(self):
        _, ax = plt.subplots()
        display = QueryDisplay(
            self.images[:4], np.arange(4), trace_reductions=[4.0, 3.0, 2.0, 1.0]
        )
        assert display.plot_gains(ax) is display
        assert display.ax_ is ax
        assert [bar.get_height() for bar in display.bars_] == [4, 3, 2, 1]
        np.testing.assert_array_equal(display.line_.get_xdata(), [1, 2, 3, 4])
        np.testing.assert_allclose(display.line_.get_ydata(), [40, 70, 90, 100])
        np.testing.assert_allclose(display.shares_, [0.4, 0.7, 0.9, 1])
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("pick", "gain (trace reduction)")
        assert display.line_.axes.get_ylabel() == "% of the query's whole gain"
        words = [text.get_text() for text in ax.get_legend().get_texts()]
        assert words == ["gain of the pick (left)", "share reached (right)"]

    def test_gains_of_one_pick(self):
        strategy = SimpleNamespace(
            query_idx_=np.array([2]), trace_reductions_=np.array([0.5])
        )
        display = QueryDisplay.from_strategy(
            strategy, {"left": self.images}
        ).plot_gains()
        assert display.shares_.tolist() == [1.0]

    @pytest.mark.parametrize(
        ("gains", "message"),
        [
            (None, "there are no gains to draw; pass trace_reductions"),
            (
                [1.0],
                "trace_reductions has 1 entries for 2 picks; expected one per pick",
            ),
            ([0.0, 0.0], "the gains add up to 0, so that no pick has a share of them"),
        ],
    )
    def test_no_gains(self, gains, message):
        with pytest.raises(ValueError, match=message):
            QueryDisplay(self.images[:2], [0, 1], trace_reductions=gains).plot_gains()

    def test_axes_outside_a_grid(self):
        with pytest.raises(ValueError, match=r"no place in a grid.*plt\.subplots"):
            QueryDisplay(self.images, np.arange(5)).plot(
                plt.figure().add_axes((0, 0, 1, 1))
            )


class TestMaskDisplay:
    counts = MappingProxyType({"conv.weight": 9, "norm.weight": 0, "head.weight": 20})

    def drawn(self, display):
        names = [label.get_text() for label in display.ax_.get_yticklabels()]
        widths = [bar.get_width() for bar in display.bars_]
        return dict(zip(names, widths, strict=True))

    def test_bars(self):
        display = MaskDisplay(self.counts).plot()
        assert self.drawn(display) == {"conv.weight": 9, "head.weight": 20}
        assert [text.get_text() for text in display.ax_.texts] == ["9", "20"]
        bottom, top = display.ax_.get_ylim()
        assert bottom > top, "the first layer must be on top"

    def test_empty_layers_on_request(self):
        assert self.drawn(MaskDisplay(self.counts).plot(empty=True)) == self.counts

    def test_shares_from_the_module(self):
        module = torch.nn.Sequential()
        module.add_module("conv", torch.nn.Conv2d(1, 4, 3, bias=False))
        module.add_module("norm", torch.nn.BatchNorm2d(4))
        module.add_module("head", torch.nn.Linear(4, 5))
        strategy = SimpleNamespace(weights_per_layer_=self.counts)
        display = MaskDisplay.from_strategy(strategy, module=module).plot()
        assert [text.get_text() for text in display.ax_.texts] == [
            "9 (25%)",
            "20 (100%)",
        ]

    def test_strategy_before_its_query(self):
        with pytest.raises(
            ValueError, match="SimpleNamespace has no weights_per_layer_; run a query"
        ):
            MaskDisplay.from_strategy(SimpleNamespace())

    def test_size_not_given(self):
        with pytest.raises(
            ValueError,
            match=r"layer_sizes lacks 'head.weight'; give the size of every layer",
        ):
            MaskDisplay(self.counts, {"conv.weight": 36}).plot()

    def test_nothing_kept(self):
        with pytest.raises(
            ValueError, match="keeps no weight; expected at least one count above 0"
        ):
            MaskDisplay({"conv.weight": 0}).plot()


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(
        ImportError, match=r"needs matplotlib.*pip install 'fishermask-sk\[plot\]'"
    ):
        MaskDisplay({"conv.weight": 1}).plot()
