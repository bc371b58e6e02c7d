"""A Vision Transformer
====================

What a query on it would cost, the loop, and another device. A minute on one core.
"""

# %%
# The net
# -------
# Torchvision's transformer, for one channel and 8×8 pixels. It returns logits, which
# are what ``CrossEntropyLoss`` takes.
import torch
from skorch import NeuralNetClassifier
from torch import nn
from torchvision.models import VisionTransformer

MAX_EPOCHS, N_EACH, N_ROUNDS, N_POOL = 60, 80, 4, 60_000
torch.manual_seed(0)


class DigitTransformer(VisionTransformer):
    def __init__(self):
        shape = {"num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
        super().__init__(8, 2, num_classes=10, dropout=0.1, **shape)
        self.conv_proj = nn.Conv2d(1, 32, kernel_size=2, stride=2)


training = {"optimizer": torch.optim.AdamW, "lr": 2e-3, "batch_size": 16}
training |= {"max_epochs": MAX_EPOCHS, "train_split": None, "verbose": 0}
training |= {"classes": range(10)}  # the first labels may lack some of them
net = NeuralNetClassifier(DigitTransformer, criterion=nn.CrossEntropyLoss, **training)

# %%
# A learner with 40 labels
# ------------------------
import numpy as np

from fishermask_sk import FisherMask, check_network
from fishermask_sk.datasets import load_images
from fishermask_sk.modal import ActiveLearner

images = load_images("digits", subset=dict.fromkeys(range(10), N_EACH), random_state=0)
X_pool, y_pool, n = images.X_train, images.y_train, 40
learner = ActiveLearner(net, FisherMask(0.05, random_state=0), X_pool[:n], y_pool[:n])
X_pool, y_pool = X_pool[n:], y_pool[n:]

# %%
# Before anything is spent
# ------------------------
# ``check_network`` says how gradients are found, what the mask may touch, and what a
# query on a pool of 60,000 would cost.
print(check_network(learner, X_pool, n_instances=20, n_pool=N_POOL))


# %%
# The loop, with ``y_pool`` for the person who labels
# ----------------------------------------------------
def ask_and_teach(learner, X_pool, y_pool):
    query_idx, X_query = learner.query(X_pool, n_instances=20)
    learner.teach(X_query, y_pool[query_idx])
    accuracy = learner.score(images.X_test, images.y_test)
    print(f"{len(learner.X_training)} labels: accuracy {accuracy:.3f}")
    return np.delete(X_pool, query_idx, axis=0), np.delete(y_pool, query_idx)


for _ in range(N_ROUNDS):
    X_pool, y_pool = ask_and_teach(learner, X_pool, y_pool)

# %%
# Tomorrow, on another machine
# ----------------------------
# A saved learner continues where it was. Weights from a GPU that is not there come to
# the CPU; to move a net to a GPU, set its device and move its module.
import pickle

learner = pickle.loads(pickle.dumps(learner))  # in earnest, by way of a file
learner.estimator.set_params(device="cuda" if torch.cuda.is_available() else "cpu")
learner.estimator.module_.to(learner.estimator.device)
X_pool, y_pool = ask_and_teach(learner, X_pool, y_pool)
# sphinx_gallery_thumbnail_path = 'images/results-networks-images-vision-transformer.svg'  # noqa: E501
