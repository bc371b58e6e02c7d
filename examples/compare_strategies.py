"""Seven strategies, seed by seed
==============================

FisherMask and six other strategies on an imbalanced pool. A quarter of an hour on one
core; the output below is from such a run.
"""

# %%
# An imbalanced pool
# ------------------
# Three common classes and seven rare ones. In the test set all classes are equally
# common.
from fishermask_sk import FisherMask, ResNet18Classifier, baselines, compare_strategies
from fishermask_sk.datasets import load_images

WIDTH, MAX_EPOCHS, SPARSITY, N_QUERIES, N_SEEDS, N_JOBS = 16, 200, 0.002, 5, 5, 1

in_pool = dict.fromkeys(range(3), 60) | dict.fromkeys(range(3, 10), 12)
images = load_images("digits", subset=in_pool, random_state=0)
training = {"max_epochs": MAX_EPOCHS, "min_steps": 30, "lr": 2e-3}
# A first batch may lack some classes, so the net is told all of them.
net = ResNet18Classifier(WIDTH, head_bias=False, classes=range(10), **training)

# %%
# Strategies have names
# ---------------------
# A strategy is any function ``(learner, X_pool, n_instances) -> positions``.
strategies = {
    "FisherMask": FisherMask(SPARSITY),
    "BAIT": baselines.bait_sampling,
    "BADGE": baselines.badge_sampling,
    "k-center": baselines.kcenter_sampling,
    "margin": baselines.margin_sampling,
    "entropy": baselines.entropy_sampling,
    "random": baselines.random_sampling,
}

# %%
# The comparison
# --------------
# With the same seed, all strategies share the first batch and the noise of training.
# Rounds that are in the results file are not run again: stop it whenever you like and
# start it again.
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
    results="compare.jsonl",
    verbose=1,
)

# %%
# Who is ahead, and is it significant?
# ------------------------------------
# How far the area under each curve is above that of random sampling, on the same seeds,
# with its 95 % interval. The p-value is that of a paired test, corrected for the six
# comparisons.
for row in results.summary(baseline="random", metric="balanced_accuracy")[:-1]:
    lead, low, high = row["area_difference"], row["area_low"], row["area_high"]
    interval = f"{lead:+.3f} [{low:+.3f}, {high:+.3f}]"
    print(f"{row['strategy']:12}{interval}  p = {row['p_holm']:.3f}")

# %%
# The curves
# ----------
from fishermask_sk.plotting import LearningCurveDisplay

display = LearningCurveDisplay.from_results(results, metric="balanced_accuracy")
display.plot(highlight=["FisherMask", "margin", "random"])
display.figure_.savefig("compare.png", dpi=110)
# sphinx_gallery_thumbnail_path = '_saved/compare_strategies.png'
