"""A mask rule of your own
=======================

You decide which weights describe a sample. Ten seconds on one core.
"""

# %%
# The rule
# --------
# A rule is a function ``(scores, k, slices) -> positions``. It gets the diagonal Fisher
# information of all weights, how many to keep, and where in the scores the weights of
# each parameter are. This one gives every stage of the net, and its head, the same
# number of weights: its best ones, or all that it has.
import torch


def equal_shares(scores, k, slices):
    stages = {}
    for name, place in slices.items():
        positions = torch.arange(place.start, place.stop, device=scores.device)
        stages.setdefault(name.split(".")[0], []).append(positions)
    kept = []
    for parts in stages.values():
        positions = torch.cat(parts)
        best = scores[positions].argsort(descending=True, stable=True)
        kept.append(positions[best[: k // len(stages)]])
    return torch.cat(kept)


# %%
# A net that knows a few digits
# -----------------------------
from fishermask_sk import FisherMask, ResNet18Classifier
from fishermask_sk.datasets import load_images

WIDTH, MAX_EPOCHS, SPARSITY = 16, 200, 0.002

images = load_images("digits", subset=dict.fromkeys(range(10), 30), random_state=0)
X_labeled, y_labeled = images.X_train[::5], images.y_train[::5]
X_pool = images.X_train[1::5]
net = ResNet18Classifier(
    WIDTH, classes=range(10), max_epochs=MAX_EPOCHS, random_state=0
).fit(X_labeled, y_labeled)

# %%
# Two masks, two answers
# ----------------------
# Where the weights of each mask are, and which ten images it asks for.
for name, mask in {"fisher": "fisher", "equal shares": equal_shares}.items():
    strategy = FisherMask(SPARSITY, mask=mask, random_state=0)
    query_idx = strategy.select(net, X_pool, n_instances=10, X_labeled=X_labeled)
    weights = {}
    for parameter, count in strategy.weights_per_layer_.items():
        stage = parameter.split(".")[0]
        weights[stage] = weights.get(stage, 0) + count
    print(f"{name}: {len(strategy.mask_indices_)} weights, {weights}")
    print(f"  asks for {query_idx.tolist()}")
# sphinx_gallery_thumbnail_path = 'images/mask.svg'
