"""A transformer that reads sentences
==================================

It asks which sentences to label; a Pipeline turns text into the net's dict of inputs.
Half a minute on one core.
"""

# %%
# The inputs have the names that Hugging Face's models take. Words become numbers by
# their hash, and 0 pads.
import inspect
import zlib

import numpy as np
import scipy.stats
import torch
from torch import nn

WORDS, LENGTH, MAX_EPOCHS, N_TEXTS, N_ROUNDS = 2_000, 16, 40, None, 4
torch.manual_seed(0)


def to_inputs(sentences):
    ids = np.zeros((len(sentences), LENGTH), dtype=np.int64)
    for row, sentence in zip(ids, sentences, strict=True):
        words = sentence.lower().encode().split()[:LENGTH]
        row[: len(words)] = [1 + zlib.crc32(word) % (WORDS - 1) for word in words]
    return {"input_ids": ids, "attention_mask": np.int64(ids > 0)}


# %%
# The net: an encoder, the mean over the words, a linear head.
class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 32), nn.Linear(32, 3)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, input_ids, attention_mask):
        x, padding = self.words(input_ids), attention_mask == 0
        x = attention_mask[..., None] * self.encoder(x, src_key_padding_mask=padding)
        return self.head(x.sum(1) / attention_mask.sum(1, keepdim=True))


# %%
# Sentences that every machine has: how three libraries begin to describe what is in
# them. From which does a sentence come?
texts = set()
for y, library in enumerate([np, scipy.stats, nn]):
    lines = (inspect.getdoc(member) or "" for member in vars(library).values())
    texts |= {(line.split("\n\n")[0], y) for line in lines if len(line.split()) > 3}
X, y = np.random.default_rng(0).permutation(sorted(texts))[:N_TEXTS].T
X_test, X_pool, y_test, y_pool = X[::4], X[1::2], np.int64(y[::4]), np.int64(y[1::2])

# %%
# The learner keeps sentences. The embedding of words is most of this net; it is left
# out of the mask, so that the rest competes.
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skorch import NeuralNetClassifier

from fishermask_sk import FisherMask
from fishermask_sk.modal import ActiveLearner

adam = {"optimizer": torch.optim.Adam, "lr": 1e-3, "batch_size": 16}
training = {"max_epochs": MAX_EPOCHS, "train_split": None, "verbose": 0, **adam}
net = NeuralNetClassifier(Reader, criterion=nn.CrossEntropyLoss, **training)
pipe = make_pipeline(FunctionTransformer(to_inputs), net)
strategy = FisherMask(600, layers=["encoder.*", "head.*"], random_state=0)
learner = ActiveLearner(pipe, strategy, X_pool[:24], y_pool[:24])
X_pool, y_pool = X_pool[24:], y_pool[24:]
for _ in range(N_ROUNDS):
    query_idx, X_query = learner.query(X_pool, n_instances=12)
    learner.teach(X_query, y_pool[query_idx])  # a person labels here
    X_pool, y_pool = np.delete(X_pool, query_idx), np.delete(y_pool, query_idx)
    accuracy = learner.score(X_test, y_test)
    print(f"{len(learner.X_training)} labels: accuracy {accuracy:.3f}")
print(*X_query[:3], sep="\n")  # what it asked for last
# sphinx_gallery_thumbnail_path = 'images/results-networks-text-transformer.svg'
