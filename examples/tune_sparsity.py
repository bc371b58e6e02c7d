"""Tune the sparsity by cross-validation
=====================================

What decides is the score after the label budget is spent. An hour on one core; the
output below is from such a run.

This needs a data set that is **labelled already**. A search runs the whole loop for
every setting and judges by held-out labels. On the pool that you want to have labelled,
this would cost more labels than it could save. Take a labelled set that resembles
yours, and carry the sparsity over.
"""

# %%
# The labelled set
# ----------------
# Imbalanced, as pools often are: three common classes and seven rare ones.
from fishermask_sk import ActiveLearningClassifier, FisherMask, ResNet18Classifier
from fishermask_sk.datasets import load_images

WIDTH, MAX_EPOCHS = 16, 200
N_RARE, N_INSTANCES, N_JOBS = 20, 48, 1
KEEP_HEAD = True

pool = dict.fromkeys(range(3), 60) | dict.fromkeys(range(3, 10), N_RARE)
images = load_images("digits", subset=pool, random_state=0)

# %%
# The loop is a classifier
# ------------------------
# ``fit`` draws a first batch, fits the net, asks for labels and fits again. With an int
# as ``random_state``, every sparsity gets the same first batch and the same training
# noise. One query is enough here: a hundredth of the weights makes matrices of 7,014
# rows, and queries take most of the time.
training = {"max_epochs": MAX_EPOCHS, "min_steps": 30, "lr": 2e-3}
net = ResNet18Classifier(WIDTH, head_bias=False, classes=range(10), **training)
loop = ActiveLearningClassifier(
    net,
    FisherMask(keep_head=KEEP_HEAD),
    n_initial=24,
    n_instances=N_INSTANCES,
    n_queries=1,
    random_state=0,
)

# %%
# The search
# ----------
# The paper's four sparsities. With 0.001, the mask is smaller than the head, and a
# warning says so. ``n_jobs=2`` runs two loops at once; each holds a pool and its
# matrices.
from sklearn.model_selection import GridSearchCV, StratifiedKFold

search = GridSearchCV(
    loop,
    {"query_strategy__sparsity": [0.01, 0.005, 0.002, 0.001]},
    scoring="balanced_accuracy",
    cv=StratifiedKFold(2, shuffle=True, random_state=0),
    n_jobs=N_JOBS,
)
search.fit(images.X_train, images.y_train)

# %%
# What it found
# -------------
# Compare the differences with the scatter over the folds before you believe a winner.
results = search.cv_results_
print("sparsity  balanced accuracy  ± over folds")
sparsities = results["param_query_strategy__sparsity"]
scores = zip(results["mean_test_score"], results["std_test_score"], strict=True)
for sparsity, (mean, spread) in zip(sparsities, scores, strict=True):
    print(f"{sparsity:<8}  {mean:<17.3f}  {spread:.3f}")
print(f"best sparsity: {search.best_params_['query_strategy__sparsity']}")
n_labels = len(search.best_estimator_.labeled_indices_)
print(f"labels spent per candidate: {n_labels} of {len(images.y_train)}")
score = search.score(images.X_test, images.y_test)
print(f"balanced accuracy on the test images: {score:.3f}")
# sphinx_gallery_thumbnail_path = 'images/results-sparsity-imbalanced-14x14-variants.svg'  # noqa: E501
