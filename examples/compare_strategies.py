"""Seven strategies, seed by seed
==============================

FisherMask and six other strategies on an imbalanced pool. A quarter of an hour on one
core; the output below is from such a run.
"""
# sphinx_gallery_thumbnail_path = '_saved/compare_strategies.png'

# %%
# An imbalanced pool
# ------------------
# Three common classes and seven rare ones. In the test set all classes are equally
# common.
from pathlib import Path

from fishermask_sk import FisherMask, ResNet18Classifier, compare_strategies
from fishermask_sk.datasets import load_images

WIDTH, MAX_EPOCHS, SPARSITY = 16, 200, 0.002
N_QUERIES, N_SEEDS, N_JOBS = 5, 5, 1
OUTPUT = Path("results")

images = load_images(
    "digits",
    subset=dict.fromkeys(range(3), 60) | dict.fromkeys(range(3, 10), 12),
    random_state=0,
)
net = ResNet18Classifier(
    WIDTH,
    head_bias=False,
    classes=range(10),  # a first batch may lack some classes
    max_epochs=MAX_EPOCHS,
    min_steps=30,
    lr=2e-3,
)

# %%
# Strategies have names
# ---------------------
# A strategy is any function ``(learner, X_pool, n_instances) -> positions``.
from fishermask_sk.baselines import (
    badge_sampling,
    bait_sampling,
    entropy_sampling,
    kcenter_sampling,
    margin_sampling,
    random_sampling,
)

strategies = {
    "FisherMask": FisherMask(SPARSITY),
    "BAIT": bait_sampling,
    "BADGE": badge_sampling,
    "k-center": kcenter_sampling,
    "margin": margin_sampling,
    "entropy": entropy_sampling,
    "random": random_sampling,
}

# %%
# The comparison
# --------------
# With the same seed, all strategies share the first batch and the noise of training.
# Rounds that are in the results file are not run again: stop it whenever you like and
# start it again.
OUTPUT.mkdir(parents=True, exist_ok=True)
results = compare_strategies(
    net,
    strategies,
    images.X_train,
    images.y_train,
    images.X_test,
    images.y_test,
    n_initial=24,
    n_instances=12,
    n_queries=N_QUERIES,
    seeds=N_SEEDS,
    n_jobs=N_JOBS,
    results=OUTPUT / "compare.jsonl",
    verbose=1,
)

# %%
# Who is ahead, and is it significant?
# ------------------------------------
# How far the area under each curve is above that of random sampling, on the same seeds,
# with its 95 % interval. The p-value is that of a paired test, corrected for the six
# comparisons.
for row in results.summary(baseline="random", metric="balanced_accuracy"):
    lead, low, high = row["area_difference"], row["area_low"], row["area_high"]
    print(
        f"{row['strategy']:12}{lead:+.3f} [{low:+.3f}, {high:+.3f}]  "
        f"p = {row['p_holm']:.3f}"
    )

# %%
# The curves
# ----------
from fishermask_sk.plotting import LearningCurveDisplay

display = LearningCurveDisplay.from_results(results, metric="balanced_accuracy")
display.plot(highlight=["FisherMask", "margin", "random"])
display.figure_.savefig(OUTPUT / "compare.png", dpi=110)
