"""A mask rule of your own
=======================

Which weights describe a sample can be left to you.

.. code-block:: sh

    python examples/custom_mask.py            # digits and a narrow ResNet-18
    python examples/custom_mask.py --quick    # a tiny net, hardly trained: does it run?

A rule is a function ``(scores, k, slices) -> positions``: the diagonal Fisher
information of all weights, how many to keep, and where in the scores the weights of
each parameter lie.
"""

import argparse

import torch

from fishermask_sk import FisherMask, ResNet18Classifier
from fishermask_sk.datasets import load_images

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--quick", action="store_true", help="a tiny net, hardly trained")
quick = parser.parse_args().quick


def equal_shares(scores, k, slices):
    """Give every stage of the net, and its head, the same number of weights, or all it
    has: the best ones.
    """
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


images = load_images("digits", subset=dict.fromkeys(range(10), 30), random_state=0)
X_labeled, y_labeled, X_pool = (
    images.X_train[::5],
    images.y_train[::5],
    images.X_train[1::5],
)
net = ResNet18Classifier(
    width=4 if quick else 16,
    classes=range(10),
    max_epochs=1 if quick else 200,
    random_state=0,
).fit(X_labeled, y_labeled)

for name, mask in {"fisher": "fisher", "equal shares": equal_shares}.items():
    strategy = FisherMask(sparsity=0.02 if quick else 0.002, mask=mask, random_state=0)
    query_idx = strategy.select(net, X_pool, n_instances=10, X_labeled=X_labeled)
    weights = {}
    for parameter, count in strategy.weights_per_layer_.items():
        stage = parameter.split(".")[0]
        weights[stage] = weights.get(stage, 0) + count
    print(f"{name}: {len(strategy.mask_indices_)} weights, {weights}")
    print(f"  asks for {query_idx.tolist()}")
