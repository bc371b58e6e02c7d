"""A transformer that reads sentences
==================================

It asks which sentences to label; a Pipeline turns text into the net's dict of inputs.
Half a minute on one core.
"""
# sphinx_gallery_thumbnail_path = 'images/results-networks-text-transformer.svg'

# %%
# From words to numbers
# ---------------------
# The inputs have the names that Hugging Face's models take. Words become numbers by
# their hash, and 0 pads.
import re
import zlib

import numpy as np
import torch
from torch import nn

WORDS, LENGTH = 2_000, 16
MAX_EPOCHS, N_TEXTS, N_ROUNDS = 40, None, 4
torch.manual_seed(0)


def to_inputs(sentences):
    words = [re.findall(r"\w+", sentence.lower()) for sentence in sentences]
    ids = np.zeros((len(words), LENGTH), dtype=np.int64)
    for row, sentence in zip(ids, words, strict=True):
        numbers = [1 + zlib.crc32(word.encode()) % (WORDS - 1) for word in sentence]
        row[: len(numbers)] = numbers[:LENGTH]
    return {"input_ids": ids, "attention_mask": np.int64(ids > 0)}


# %%
# The net
# -------
# Two layers of an encoder, the mean over the words, and a linear head.
class Reader(nn.Module):
    def __init__(self, n_classes, width=32):
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.places = nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, n_classes)

    def forward(self, input_ids, attention_mask):
        places = torch.arange(LENGTH, device=input_ids.device)
        x = self.words(input_ids) + self.places(places)
        x = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        known = attention_mask[..., None]
        return self.head((known * x).sum(1) / known.sum(1))


# %%
# Sentences that every machine has
# --------------------------------
# How four libraries begin to describe their functions. From which does a line come?
import inspect

import scipy.stats
from sklearn.utils.discovery import all_estimators

libraries = {
    "numpy": vars(np),
    "scipy.stats": vars(scipy.stats),
    "torch.nn": vars(nn),
    "sklearn": dict(all_estimators()),
}
texts = []
for y, members in enumerate(libraries.values()):
    described = (inspect.getdoc(member) for member in members.values())
    firsts = {text.split("\n\n")[0] for text in described if text}
    texts += [(line, y) for line in sorted(firsts) if len(line.split()) > 3]
order = np.random.default_rng(0).permutation(len(texts))[:N_TEXTS]
X = np.array([texts[i][0] for i in order], dtype=object)
y = np.array([texts[i][1] for i in order])
X_test, y_test = X[::4], y[::4]
X_pool, y_pool = np.delete(X, np.s_[::4]), np.delete(y, np.s_[::4])

# %%
# The loop
# --------
# The learner keeps sentences; the Pipeline makes the dict. The embedding of words is
# most of this net. It is left out of the mask, so that the rest competes.
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skorch import NeuralNetClassifier

from fishermask_sk import FisherMask
from fishermask_sk.modal import ActiveLearner

net = NeuralNetClassifier(
    Reader,
    module__n_classes=len(libraries),
    criterion=nn.CrossEntropyLoss,
    optimizer=torch.optim.Adam,
    lr=1e-3,
    batch_size=16,
    max_epochs=MAX_EPOCHS,
    classes=range(len(libraries)),
    train_split=None,
    verbose=0,
)
pipe = make_pipeline(FunctionTransformer(to_inputs), net)
strategy = FisherMask(600, layers=["places.*", "encoder.*", "head.*"], random_state=0)
learner = ActiveLearner(pipe, strategy, X_pool[:24], y_pool[:24])
X_pool, y_pool = X_pool[24:], y_pool[24:]
for _ in range(N_ROUNDS):
    query_idx, X_query = learner.query(X_pool, n_instances=12)
    learner.teach(X_query, y_pool[query_idx])  # a person labels here
    X_pool, y_pool = np.delete(X_pool, query_idx), np.delete(y_pool, query_idx)
    accuracy = learner.score(X_test, y_test)
    print(f"{len(learner.X_training)} labels: accuracy {accuracy:.3f}")

# %%
# What it asked for last
# ----------------------
print(*X_query[:3], sep="\n")
