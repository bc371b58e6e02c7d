"""A table with gaps and words
===========================

Preprocessing and an MLP in one Pipeline, which asks for the rows to label.

.. code-block:: sh

    python examples/tabular_pipeline.py # breast cancer, 30 measurements and a category
    python examples/tabular_pipeline.py --quick # hardly trained: does it run?
"""

import argparse

import numpy as np
import pandas as pd
import torch
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.datasets import load_breast_cancer
from sklearn.impute import SimpleImputer
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from skorch import NeuralNetClassifier
from torch import nn

from fishermask_sk import FisherMask
from fishermask_sk.modal import ActiveLearner

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--quick", action="store_true", help="hardly trained")
quick = parser.parse_args().quick
torch.manual_seed(0)
rng = np.random.default_rng(0)

# A table as tables are: a twentieth of the measurements is missing, and one column
# holds words.
table, labels = load_breast_cancer(return_X_y=True, as_frame=True)
table = table.mask(rng.random(table.shape) < 0.05)
table["clinic"] = rng.choice(["north", "south", "sea"], len(table))
X_train, X_test, y_train, y_test = train_test_split(
    table, labels, test_size=0.3, random_state=0
)

preprocessing = make_column_transformer(
    (
        make_pipeline(SimpleImputer(), StandardScaler()),
        make_column_selector(dtype_include="number"),
    ),
    (OneHotEncoder(handle_unknown="ignore"), ["clinic"]),
    sparse_threshold=0,
)


class MLP(nn.Sequential):
    def __init__(self, n_columns=33, width=32):
        super().__init__(
            nn.Linear(n_columns, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(width, 2),
        )


net = NeuralNetClassifier(
    MLP,
    criterion=nn.CrossEntropyLoss,
    optimizer=torch.optim.Adam,
    lr=5e-3,
    batch_size=16,
    max_epochs=2 if quick else 40,
    classes=[0, 1],
    train_split=None,
    verbose=0,
)
to_float32 = FunctionTransformer(lambda values: values.astype("float32"))
pipe = make_pipeline(preprocessing, to_float32, net)

# The learner holds rows of the table as they are. Each `teach` fits the whole pipeline
# on the labelled rows, and a query sends pool and labelled rows through its steps once.
first = rng.choice(len(X_train), 12, replace=False)
learner = ActiveLearner(
    pipe,
    FisherMask(
        0.2, random_state=0
    ),  # a small net: a fifth of its 2,210 weights, where a ResNet takes 0.002
    X_training=X_train.iloc[first],
    y_training=y_train.iloc[first],
    force_all_finite="allow-nan",  # the imputer will see to them
)
X_pool, y_pool = X_train.drop(X_train.index[first]), y_train.drop(y_train.index[first])
for _ in range(1 if quick else 5):
    query_idx, rows = learner.query(X_pool, n_instances=6)
    learner.teach(rows, y_pool.iloc[query_idx])  # your oracle goes here
    X_pool, y_pool = X_pool.drop(rows.index), y_pool.drop(rows.index)
    print(
        f"{len(learner.X_training)} labels: accuracy "
        f"{learner.score(X_test, y_test):.3f}"
    )

# What it asked for last, in the order of asking, beside the columns that a person would
# look at.
gains = pd.Series(learner.query_strategy.trace_reductions_, rows.index, name="gain")
print(rows[["mean radius", "mean texture", "clinic"]].join(gains).to_string())
