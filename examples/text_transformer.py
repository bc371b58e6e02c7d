"""A transformer that reads sentences
==================================

It asks which sentences to label; a Pipeline turns text into the net's dict of inputs.

.. code-block:: sh

    python examples/text_transformer.py # which library does a line of documentation
    come from? python examples/text_transformer.py --quick # few sentences, hardly
    trained: does it run?
"""

import argparse
import inspect
import re
import zlib

import numpy as np
import scipy.stats
import sklearn.utils.discovery
import torch
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skorch import NeuralNetClassifier
from torch import nn

from fishermask_sk import FisherMask
from fishermask_sk.modal import ActiveLearner

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument(
    "--quick", action="store_true", help="few sentences, hardly trained"
)
quick = parser.parse_args().quick
torch.manual_seed(0)
WORDS, LENGTH = 2_000, 16


def to_inputs(sentences):
    """What Hugging Face's models take; words become numbers by their hash, and 0
    pads.
    """
    words = [re.findall(r"\w+", sentence.lower()) for sentence in sentences]
    rows = [
        [1 + zlib.crc32(word.encode()) % (WORDS - 1) for word in row] for row in words
    ]
    ids = np.array([(row + [0] * LENGTH)[:LENGTH] for row in rows])
    return {"input_ids": ids, "attention_mask": np.int64(ids > 0)}


class Reader(nn.Module):
    def __init__(self, n_classes, width=32):
        super().__init__()
        self.words, self.places = (
            nn.Embedding(WORDS, width),
            nn.Embedding(LENGTH, width),
        )
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, n_classes)

    def forward(self, input_ids, attention_mask):
        x = self.words(input_ids) + self.places(
            torch.arange(LENGTH, device=input_ids.device)
        )
        x = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        return self.head(
            (attention_mask[..., None] * x).sum(1) / attention_mask.sum(1, keepdim=True)
        )


# Real sentences that every machine has: how four libraries begin to describe their
# functions.
estimators = dict(sklearn.utils.discovery.all_estimators())
libraries = {
    "numpy": vars(np),
    "scipy.stats": vars(scipy.stats),
    "torch.nn": vars(nn),
    "sklearn": estimators,
}
texts = [
    (line, y)
    for y, members in enumerate(libraries.values())
    for line in sorted(
        {
            inspect.getdoc(m).split("\n\n")[0]
            for m in members.values()
            if inspect.getdoc(m)
        }
    )
    if len(line.split()) > 3
]
texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))][
    : 60 if quick else None
]
X, y = (
    np.array([line for line, _ in texts], dtype=object),
    np.array([y for _, y in texts]),
)
X_test, y_test, X_pool, y_pool = (
    X[::4],
    y[::4],
    np.delete(X, np.s_[::4]),
    np.delete(y, np.s_[::4]),
)
net = NeuralNetClassifier(
    Reader,
    module__n_classes=len(libraries),
    criterion=nn.CrossEntropyLoss,
    optimizer=torch.optim.Adam,
    lr=1e-3,
    batch_size=16,
    max_epochs=2 if quick else 40,
    classes=range(len(libraries)),
    train_split=None,
    verbose=0,
)
pipe = make_pipeline(FunctionTransformer(to_inputs), net)
# The embedding of words is most of this net; without it, the rest competes for the
# mask.
strategy = FisherMask(600, layers=["places.*", "encoder.*", "head.*"], random_state=0)
learner = ActiveLearner(pipe, strategy, X_pool[:24], y_pool[:24])
X_pool, y_pool = X_pool[24:], y_pool[24:]
for _ in range(1 if quick else 4):
    query_idx, X_query = learner.query(X_pool, n_instances=12)
    learner.teach(X_query, y_pool[query_idx])  # your oracle goes here
    X_pool, y_pool = np.delete(X_pool, query_idx), np.delete(y_pool, query_idx)
    print(
        f"{len(learner.X_training)} labels: accuracy "
        f"{learner.score(X_test, y_test):.3f}"
    )
print("asked for last:", *X_query[:3], sep="\n  ")
