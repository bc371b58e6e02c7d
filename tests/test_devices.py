"""How a query computes: full float32, recurrent layers without cuDNN, wrapped nets on
one device; and that all of it is as before afterwards.
"""

import numpy as np
import pytest
import torch
from skorch import NeuralNetClassifier
from torch import nn

from fishermask_sk import FisherMask
from fishermask_sk.devices import OPERATIONS, suited_to_gradients

MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn
HAS_NEWER = hasattr(MATMUL, "fp32_precision")
FLOAT32 = ("matmul", "conv", "rnn", "mkldnn matmul", "mkldnn conv", "mkldnn rnn")
NEWER = pytest.mark.skipif(not HAS_NEWER, reason="torch has fp32_precision from 2.9")


def reading(read):
    """What is read, or that reading raises: then the newer interface was used."""
    try:
        return read()
    except RuntimeError:
        return "raises"


def settings():
    found = {
        "precision": reading(torch.get_float32_matmul_precision),
        "allow_tf32": reading(lambda: MATMUL.allow_tf32),
        "cudnn's allow_tf32": reading(lambda: CUDNN.allow_tf32),
        "cudnn enabled": CUDNN.enabled,
    }
    if HAS_NEWER:
        places = {"": torch.backends, "cudnn": CUDNN, "matmul": MATMUL}
        places |= {"conv": CUDNN.conv, "rnn": CUDNN.rnn}
        mkldnn = torch.backends.mkldnn
        places |= {f"mkldnn {n}": getattr(mkldnn, n) for n in ("matmul", "conv", "rnn")}
        found |= {name: place.fp32_precision for name, place in places.items()}
    return found


@pytest.fixture
def default_settings():
    """Torch's own settings, before and after."""
    before = settings()
    yield
    if HAS_NEWER:
        for place in (torch.backends, CUDNN, torch.backends.mkldnn, MATMUL):
            place.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    CUDNN.allow_tf32 = True
    if HAS_NEWER:
        MATMUL.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
        for name in ("conv", "rnn"):
            getattr(torch.backends.mkldnn, name).fp32_precision = "none"
    assert settings() == before


OLDER = {
    "nothing": [],
    "highest": [lambda: torch.set_float32_matmul_precision("highest")],
    "high": [lambda: torch.set_float32_matmul_precision("high")],
    "medium": [lambda: torch.set_float32_matmul_precision("medium")],
    "allow_tf32": [lambda: setattr(MATMUL, "allow_tf32", True)],
    "no tf32": [lambda: setattr(CUDNN, "allow_tf32", False)],
}
OF_ALL = lambda: setattr(torch.backends, "fp32_precision", "tf32")  # noqa: E731
OF_MATMUL = lambda: setattr(MATMUL, "fp32_precision", "tf32")  # noqa: E731
BY_NEWER = {
    "all": [OF_ALL],
    "products": [OF_MATMUL],
    "convolutions": [lambda: setattr(CUDNN.conv, "fp32_precision", "ieee")],
    "all of cudnn": [lambda: setattr(CUDNN, "fp32_precision", "tf32")],
    "bfloat16": [
        lambda: setattr(torch.backends.mkldnn, "fp32_precision", "bf16"),
    ],
    "one of all": [
        OF_ALL,
        lambda: setattr(MATMUL, "fp32_precision", "ieee"),
    ],
    "both interfaces": [OF_MATMUL, *OLDER["high"]],
}


@pytest.mark.parametrize(
    "chosen",
    [*OLDER.values(), *(pytest.param(c, marks=NEWER) for c in BY_NEWER.values())],
    ids=[*OLDER, *BY_NEWER],
)
@pytest.mark.usefixtures("default_settings")
def test_products_are_float32_inside_and_what_the_user_chose_outside(chosen):
    for choose in chosen:
        choose()
    before = settings()
    with pytest.raises(KeyError), suited_to_gradients(nn.Linear(2, 2)):
        inside = settings()
        raise KeyError
    assert settings() == before
    if HAS_NEWER:
        # Read so, "none" is what torch does where nothing above says otherwise.
        assert {inside[name] for name in FLOAT32} <= {"none", "ieee"}
    else:
        assert inside["precision"] == "highest"
        assert not (inside["allow_tf32"] or inside["cudnn's allow_tf32"])
    if "raises" not in (before["precision"], before["allow_tf32"]):
        assert inside["precision"] == "highest"  # what torch itself may read


@NEWER
@pytest.mark.usefixtures("default_settings")
def test_what_is_inherited_stays_inherited():
    OF_ALL()
    with suited_to_gradients(nn.Linear(2, 2)):
        pass
    torch.backends.fp32_precision = "ieee"
    assert MATMUL.fp32_precision == "ieee"


@NEWER
def test_operations_are_torch_s_own():
    for name in OPERATIONS:
        place = torch.backends
        for part in name.split("."):
            place = getattr(place, part)
        assert hasattr(place, "fp32_precision")


class Noting(nn.Module):
    """Writes down whether cuDNN is on when its layer runs."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.seen = layer, []

    def forward(self, x):
        self.seen.append(torch.backends.cudnn.enabled)
        found = self.layer(x)
        return found[0].mean(1) if isinstance(found, tuple) else found


def fitted(module):
    net = NeuralNetClassifier(
        module, criterion=nn.CrossEntropyLoss, train_split=None, verbose=0
    )
    return net.initialize()


def vectors(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_do_without_cudnn(kind):
    """Its backward pass of theirs wants training mode."""
    torch.manual_seed(0)
    noting = Noting(nn.Sequential(kind(3, 4, batch_first=True)))
    FisherMask(1.0).select(fitted(noting), vectors(6, 5, 3), 2, X_labeled=vectors(0))
    assert noting.seen
    assert not any(noting.seen)
    assert torch.backends.cudnn.enabled
    noting = Noting(nn.Linear(3, 2))
    FisherMask(1.0).select(fitted(noting), vectors(6, 3), 2, X_labeled=vectors(0))
    assert all(noting.seen)
