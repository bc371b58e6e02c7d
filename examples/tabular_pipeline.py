"""A table with gaps and words
===========================

Preprocessing and an MLP in one Pipeline, which asks for the rows to label. Ten seconds
on one core.
"""

# %%
# A table as tables are
# ---------------------
# A twentieth of the measurements is missing, and one column holds words.
import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

MAX_EPOCHS, N_ROUNDS = 40, 5
torch.manual_seed(0)
rng = np.random.default_rng(0)
table, labels = load_breast_cancer(return_X_y=True, as_frame=True)
table = table.mask(rng.random(table.shape) < 0.05)
table["clinic"] = rng.choice(["north", "south", "sea"], len(table))
X_train, X_test, y_train, y_test = train_test_split(table, labels, random_state=0)

# %%
# Preprocessing and net in one
# ----------------------------
# Fill the gaps, scale, encode the words; then a small net. torch wants float32.
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from skorch import NeuralNetClassifier
from torch import nn

preprocessing = make_column_transformer(
    (make_pipeline(SimpleImputer(), StandardScaler()), table.columns[:-1]),
    (OneHotEncoder(handle_unknown="ignore"), ["clinic"]),
    sparse_threshold=0,
)


class MLP(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(33, 32), nn.ReLU(), nn.Linear(32, 2))


adam = {"optimizer": torch.optim.Adam, "lr": 5e-3, "batch_size": 16}
training = {"max_epochs": MAX_EPOCHS, "train_split": None, "verbose": 0, **adam}
net = NeuralNetClassifier(MLP, criterion=nn.CrossEntropyLoss, **training)
pipe = make_pipeline(preprocessing, FunctionTransformer(np.float32), net)

# %%
# The learner keeps rows of the table
# -----------------------------------
# Each ``teach`` fits the whole pipeline on the labelled rows. A query sends all rows
# through its steps once. A small net needs more of its weights: a fifth of 1,154.
from fishermask_sk import FisherMask
from fishermask_sk.modal import ActiveLearner

first = rng.choice(len(X_train), 12, replace=False)
known = X_train.iloc[first], y_train.iloc[first]
strategy = FisherMask(0.2, random_state=0)
# The imputer will fill the gaps.
learner = ActiveLearner(pipe, strategy, *known, force_all_finite="allow-nan")
X_pool, y_pool = X_train.drop(X_train.index[first]), y_train.drop(y_train.index[first])
for _ in range(N_ROUNDS):
    query_idx, rows = learner.query(X_pool, n_instances=6)
    learner.teach(rows, y_pool.iloc[query_idx])  # a person labels here
    X_pool, y_pool = X_pool.drop(rows.index), y_pool.drop(rows.index)
    n_labels, accuracy = len(learner.X_training), learner.score(X_test, y_test)
    print(f"{n_labels} labels: accuracy {accuracy:.3f}")

# %%
# What it asked for last
# ----------------------
shown = rows[["mean radius", "mean texture", "clinic"]]
print(shown.assign(gain=strategy.trace_reductions_).to_string())
# sphinx_gallery_thumbnail_path = 'images/results-networks-table-mlp.svg'
