"""How a query computes: full float32, recurrent layers without cuDNN, wrapped nets on
one device; and that all of it is as before afterwards.
"""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pretend_device import PretendDevice
from skorch import NeuralNetClassifier
from torch import nn

from fishermask_sk import FisherMask, check_network
from fishermask_sk.gradients.devices import OPERATIONS, suited_to_gradients

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
    stack = ExitStack()
    stack.enter_context(suited_to_gradients(nn.Linear(2, 2)))
    inside = settings()
    assert stack.__exit__(KeyError, KeyError(), None) is False  # as after an error
    assert settings() == before
    if HAS_NEWER:
        # Read so, "none" is what torch does where nothing above says otherwise.
        assert {inside[name] for name in FLOAT32} <= {"none", "ieee"}
    else:
        assert inside["precision"] == "highest"
        assert not inside["allow_tf32"]
        assert not inside["cudnn's allow_tf32"]
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

    def __init__(self, layer, seen):
        super().__init__()
        self.layer, self.note = layer, seen.add

    def forward(self, x):
        self.note(torch.backends.cudnn.enabled)
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
    seen = set()
    noting = Noting(nn.Sequential(kind(3, 4, batch_first=True)), seen)
    FisherMask(1.0).select(fitted(noting), vectors(6, 5, 3), 2, X_labeled=vectors(0))
    assert seen == {False}
    assert torch.backends.cudnn.enabled
    noting = Noting(nn.Linear(3, 2), seen)
    FisherMask(1.0).select(fitted(noting), vectors(6, 3), 2, X_labeled=vectors(0))
    assert seen == {False, True}


# Nets that lie, or compute, elsewhere.


def test_a_net_on_several_devices_is_refused():
    net = fitted(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    with PretendDevice() as device:
        device.move(net.module_[1])
        ask = lambda: FisherMask(1.0).select(net, vectors(6, 3), 2)  # noqa: E731
        with pytest.raises(
            ValueError, match="weights lie on cpu, cuda:0; expected one"
        ):
            ask()
        net.module_[0].weight = nn.Parameter(device.put(torch.ones(4, 3), "cuda:1"))
        with pytest.raises(
            ValueError, match="lie on cpu, cuda:0, cuda:1; expected one"
        ):
            ask()
        with pytest.raises(ValueError, match=r"module.to\(device\), or train it there"):
            check_network(net, vectors(6, 3))


def test_a_net_on_mps_is_refused():
    """It has no float64, in which small matrices are inverted."""
    net = fitted(nn.Linear(3, 2))
    with PretendDevice("mps:0") as device:
        device.adopt(net)
        with pytest.raises(ValueError, match=r"on MPS, which has no float64.*the CPU"):
            FisherMask(1.0).select(net, vectors(6, 3), 2)


class Replicas(nn.Module):
    """What DataParallel does on two GPUs: copies of the layer share weights and
    hooks.
    """

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(6, 3)

    def forward(self, x):
        found = []
        for part in x.chunk(2):
            replica = self.module._replicate_for_data_parallel()
            replica._parameters = {}
            replica.weight, replica.bias = self.module.weight * 1, self.module.bias * 1
            found.append(replica(part))
        return torch.cat(found)


class Spread(nn.DataParallel):
    """As if there were two GPUs."""

    def __init__(self, module):
        super().__init__(module)
        self.device_ids = [0, 1]

    def forward(self, *args):
        if len(self.device_ids) > 1:
            raise AssertionError("this would copy the net to the other GPU")
        return super().forward(*args)


@pytest.mark.parametrize("wrapper", ["replicas", "DataParallel"])
def test_a_net_that_spreads_its_batch_is_asked_on_one_device(wrapper):
    torch.manual_seed(0)
    replicas, X = Replicas(), vectors(20, 6)
    module = replicas if wrapper == "replicas" else Spread(replicas.module)
    picks = [
        FisherMask(1.0, random_state=0)
        .select(fitted(m), X, 3, X_labeled=X[:0])
        .tolist()
        for m in (replicas.module, module)
    ]
    assert picks[0] == picks[1]
    if wrapper == "DataParallel":
        assert module.device_ids == [0, 1]


def test_a_net_under_distributed_data_parallel_is_asked_alone(tmp_path):
    """Its forward pass counts on a backward pass, and on the others."""
    torch.manual_seed(0)
    module, X = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), []
    X = vectors(20, 6)
    expected = FisherMask(1.0, random_state=0).select(
        fitted(module), X, 3, X_labeled=X[:0]
    )
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(module)
        picks = FisherMask(1.0, random_state=0).select(
            fitted(wrapped), X, 3, X_labeled=X[:0]
        )
        assert wrapped.require_backward_grad_sync
        assert wrapped.require_forward_param_sync
        wrapped(torch.as_tensor(X)).sum().backward()  # it can go on training
    finally:
        dist.destroy_process_group()
    assert picks.tolist() == expected.tolist()


def test_a_query_of_a_net_on_the_cpu_does_not_start_cuda(monkeypatch):
    def started(*args, **kwargs):
        raise AssertionError("CUDA was started")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_rng_state", started)
    monkeypatch.setattr(torch.cuda, "_lazy_init", started)
    FisherMask(1.0).select(
        fitted(nn.Linear(3, 2)), vectors(6, 3), 2, X_labeled=vectors(0)
    )
