"""Study 7: a table, a text and a small Vision Transformer, 10 seeds.

Fixed before the first run: everything here. The nets and their training are those of
examples/tabular_pipeline.py, text_transformer.py and vision_transformer.py, and so are
FisherMask's sparsities. The sentences are those that the installed libraries have, so
that another version of one of them gives other numbers.
"""

import inspect
import re
import zlib

import numpy as np
import scipy.stats
import sklearn.utils.discovery
import torch
from common import BASELINES, Setting, Study, load_pool
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils import Bunch
from skorch import NeuralNetClassifier
from torch import nn
from torchvision.models import VisionTransformer

from fishermask_sk import FisherMask

WORDS, LENGTH = 2_000, 16


def split(X, y, seed):
    """Three quarters for the pool, a quarter for the test, drawn by the seed."""
    X_train, X_test, y_train, y_test = train_test_split(
        X, y, test_size=0.25, stratify=y, random_state=seed
    )
    return Bunch(X_train=X_train, y_train=y_train, X_test=X_test, y_test=y_test)


def breast_cancer(seed, data_home=None):
    X, y = load_breast_cancer(return_X_y=True)
    return split(X, y, seed)


def first_sentences(seed, data_home=None):
    """How four libraries begin to describe their functions; which one does a sentence
    come from?
    """
    estimators = dict(sklearn.utils.discovery.all_estimators())
    libraries = (vars(np), vars(scipy.stats), vars(nn), estimators)
    lines = [
        (line, y)
        for y, members in enumerate(libraries)
        for line in sorted(
            {(inspect.getdoc(m) or "").split("\n\n")[0] for m in members.values()}
        )
        if len(line.split()) > 3
    ]
    return split(
        np.array([line for line, _ in lines], dtype=object),
        np.array([y for _, y in lines]),
        seed,
    )


def digits(seed, data_home=None):
    return load_pool(seed, data_home, name="digits", pool=dict.fromkeys(range(10), 80))


def to_float32(table):
    return table.astype("float32")


def to_inputs(sentences):
    """Numbers of words, by their hash; 0 pads."""
    words = [re.findall(r"\w+", sentence.lower()) for sentence in sentences]
    rows = [
        [1 + zlib.crc32(word.encode()) % (WORDS - 1) for word in row] for row in words
    ]
    ids = np.array([(row + [0] * LENGTH)[:LENGTH] for row in rows])
    return {"input_ids": ids, "attention_mask": np.int64(ids > 0)}


class MLP(nn.Sequential):
    def __init__(self, n_columns=30, width=32):
        super().__init__(
            nn.Linear(n_columns, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(width, 2),
        )


class Reader(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.words, self.places = (
            nn.Embedding(WORDS, width),
            nn.Embedding(LENGTH, width),
        )
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 4)

    def forward(self, input_ids, attention_mask):
        x = self.words(input_ids) + self.places(
            torch.arange(LENGTH, device=input_ids.device)
        )
        x = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        return self.head(
            (attention_mask[..., None] * x).sum(1) / attention_mask.sum(1, keepdim=True)
        )


class DigitTransformer(VisionTransformer):
    def __init__(self):
        super().__init__(
            8,
            2,
            num_layers=2,
            num_heads=4,
            hidden_dim=32,
            mlp_dim=64,
            num_classes=10,
            dropout=0.1,
        )
        self.conv_proj = nn.Conv2d(1, 32, kernel_size=2, stride=2)


def net(module, n_classes, **training):
    return NeuralNetClassifier(
        module,
        criterion=nn.CrossEntropyLoss,
        classes=range(n_classes),
        train_split=None,
        verbose=0,
        batch_size=16,
        **training,
    )


ADAM = {"optimizer": torch.optim.Adam, "max_epochs": 40}
ADAMW = {
    "optimizer": torch.optim.AdamW,
    "optimizer__weight_decay": 0.05,
    "lr": 2e-3,
    "max_epochs": 60,
}

STUDY = Study(
    question="Does it hold beyond ResNets?",
    n_seeds=10,
    settings=[
        Setting(
            name="table, MLP",
            dataset="breast cancer",
            load=breast_cancer,
            estimator=make_pipeline(
                StandardScaler(),
                FunctionTransformer(to_float32),
                net(MLP, 2, lr=5e-3, **ADAM),
            ),
            strategies=BASELINES | {"FisherMask": FisherMask(0.2)},
            n_initial=12,
            n_instances=6,
            n_queries=5,
        ),
        Setting(
            name="text, transformer",
            dataset="first sentences",
            load=first_sentences,
            estimator=make_pipeline(
                FunctionTransformer(to_inputs), net(Reader, 4, lr=1e-3, **ADAM)
            ),
            strategies=BASELINES
            | {
                "FisherMask": FisherMask(
                    600, layers=["places.*", "encoder.*", "head.*"]
                )
            },
            n_initial=24,
            n_instances=12,
            n_queries=5,
        ),
        Setting(
            name="images, Vision Transformer",
            dataset="digits",
            load=digits,
            estimator=net(DigitTransformer, 10, **ADAMW),
            strategies=BASELINES | {"FisherMask": FisherMask(0.05)},
            n_initial=40,
            n_instances=20,
            n_queries=4,
        ),
    ],
)
