"""The memory budget: what it decides, that the picks stay the same, and what is said
where nothing fits.
"""

import errno
import os
import re
import shutil
import sys
import tempfile
import warnings
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
from pretend_device import PretendDevice
from process import grows_by
from skorch import NeuralNetClassifier
from torch import nn

from fishermask_sk import FisherMask, check_network
from fishermask_sk.gradients import PerSampleGradients
from fishermask_sk.memory import (
    Budget,
    Needs,
    free_bytes,
    needs,
    parse_memory,
    readable,
    uses_rows,
)
from fishermask_sk.memory.free import _left_to_container
from fishermask_sk.memory.room import _reserve, mapped

N_POOL, N_LABELED, N_CLASSES = 400, 20, 4


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, N_CLASSES))
    settings = {"verbose": 0, "train_split": None, "max_epochs": 2}
    X = vectors(N_LABELED, 1)
    net = NeuralNetClassifier(module, criterion=nn.CrossEntropyLoss, **settings)
    return net.fit(X, (np.arange(N_LABELED) % N_CLASSES).astype("int64"))


def vectors(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 8)).astype("float32")


def query(net, candidates=None, **kwargs):
    strategy = FisherMask(0.9, damping=0.1, random_state=0, **kwargs)
    strategy.select(
        net, vectors(N_POOL), 12, X_labeled=vectors(N_LABELED, 1), candidates=candidates
    )
    return strategy


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("2GiB", 2**31),
        ("1.5 kB", 1500),
        ("500 MB", 5 * 10**8),
        ("7", 7),
        (9, 9),
        ("3g", 3e9),
    ],
)
def test_memory_in_words(text, n_bytes):
    assert parse_memory(text) == n_bytes


@pytest.mark.parametrize(
    "max_memory", [0, -1, "0", "much", "2 GiBs", 1.5, True, "-1GiB"]
)
def test_memory_that_is_none(net, max_memory):
    with pytest.raises(
        ValueError,
        match=f"max_memory={re.escape(repr(max_memory))} must be a number of bytes",
    ):
        query(net, max_memory=max_memory)


def test_bytes_in_a_unit_that_suits_them():
    assert [readable(n) for n in (2**9, 3 * 2**20, 5 * 2**29)] == [
        "0.5 KiB",
        "3.0 MiB",
        "2.5 GiB",
    ]


def mapped_files():
    return list(Path(tempfile.gettempdir()).glob("fishermask-*"))


def test_picks_are_the_same_from_a_mapped_file_that_leaves_nothing(net, monkeypatch):
    expected, made = query(net), []
    from_file = torch.from_file
    k = len(expected.mask_indices_)
    # The head is kept as cotangents and inputs, without what all classes share.
    needed = needs(N_POOL, N_LABELED, N_CLASSES - 1, k - 17, 4, 12)

    def noted(path, *, size, **kwargs):
        made.append(size)
        return from_file(path, size=size, **kwargs)

    monkeypatch.setattr(torch, "from_file", noted)
    enough = query(net, max_memory=needed.embeddings + needed.matrices)
    assert not made
    streamed = query(net, max_memory=needed.matrices)
    shapes = [(N_CLASSES - 1,) * 2, (17,), (N_CLASSES - 1, k - N_CLASSES * 17)]
    assert made == [N_POOL * prod(shape) for shape in shapes]
    for strategy in (enough, streamed):
        assert strategy.query_idx_.tolist() == expected.query_idx_.tolist()
        np.testing.assert_allclose(
            strategy.trace_reductions_, expected.trace_reductions_, rtol=1e-6
        )
    assert not mapped_files()


def test_what_does_not_fit_is_refused_with_its_numbers(net, monkeypatch):
    needs = (
        r"needs about .* on top of its embeddings \(k=\d+ weights, 400 samples\) "
        r"and 8.0 KiB max_memory allows; "
    )
    with pytest.raises(
        MemoryError,
        match=needs + "no smaller mask fits, so propose fewer candidates, or raise max",
    ):
        query(net, max_memory="8KiB")
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(available=8000)
    )
    with pytest.raises(
        MemoryError,
        match=r"and 6.2 KiB may be used of what is free; no smaller mask fits",
    ):
        query(net)


def net_of(n_inputs, n_outputs):
    torch.manual_seed(0)
    return NeuralNetClassifier(
        nn.Linear(n_inputs, n_outputs),
        criterion=nn.CrossEntropyLoss,
        train_split=None,
        verbose=0,
    ).initialize()


def select_within(net, max_memory, **params):
    shape = 30, net.module_.in_features
    samples = np.random.default_rng(0).normal(size=shape).astype("float32")
    params = {"sparsity": 1.0, "random_state": 0, "max_memory": max_memory, **params}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The mask keeps")
        return FisherMask(**params).select(net, samples[5:], 3, X_labeled=samples[:5])


def settings_in(message):
    found = re.findall(r"(n_top_classes|n_components|sparsity)=(\d+)", message)
    return {name: int(value) for name, value in found}


@pytest.mark.parametrize(
    ("shape", "max_memory", "named"),
    [
        ((60, 10), "2MiB", {"sparsity", "n_components", "n_top_classes"}),
        # k is no matter where there are many outputs
        ((3, 200), "32MiB", {"n_top_classes"}),
    ],
)
def test_settings_that_fit_are_named_and_fit(shape, max_memory, named):
    net = net_of(*shape)
    with pytest.raises(MemoryError, match="fit") as caught:
        select_within(net, max_memory)
    settings = settings_in(str(caught.value))
    assert set(settings) == named
    for name, value in settings.items():
        assert len(select_within(net, max_memory, **{name: value})) == 3
        with pytest.raises(MemoryError, match="fit"):
            select_within(net, max_memory, **{name: value + 1})


MANY_CLASSES = """
import warnings
import numpy as np, torch
from fishermask_sk import FisherMask, as_estimator

warnings.simplefilter("ignore")
torch.set_num_threads(1)
torch.manual_seed(0)
net = as_estimator(torch.nn.Linear(3, 41), classes=range(41))
X = np.random.default_rng(0).normal(size=(6000, 3)).astype("float32")
strategy = FisherMask(1.0)
strategy.select(net, X[:200], 2, X_labeled=X[:9])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_what_many_classes_take_is_what_the_process_grows_by():
    """Small matrices for each candidate are what is held there."""
    grown = grows_by(MANY_CLASSES, "strategy.select(net, X, 2, X_labeled=X[:9])")
    samples = np.zeros((2000, 3), "float32")
    report = check_network(
        net_of(3, 41), samples, 2, query_strategy=FisherMask(1.0), n_pool=6000
    )
    estimate = report.bytes["matrices"] + report.bytes["embeddings"]
    assert 0.8 * estimate < grown < 1.25 * estimate


def test_small_matrices_are_counted_as_they_are_held():
    """A and B, and a third where they are made; or some of them in five copies."""
    few, many = (needs(n, 0, 99, 1000, 4).matrices for n in (10_000, 20_000))
    assert (many - few) / 10_000 == 8 * (3 * 99**2 + 10)
    few, many = (needs(n, 0, 3, 10, 4).matrices for n in (10_000, 20_000))
    assert (many - few) / 10_000 == 8 * (7 * 3**2 + 10) + 8 * 3 * 3 * 10
    few, many = (needs(n, 0, 99, 9, 4, on_cpu=False).matrices for n in (500, 900))
    assert (many - few) / 400 == 8 * (7 * 99**2 + 10) + 8 * 3 * 99 * 9


def test_two_settings_that_fit_together():
    net = net_of(3, 200)
    with pytest.raises(
        MemoryError,
        match=r"n_top_classes=2 with sparsity=\d+ fits, or raise max_memory",
    ) as caught:
        select_within(net, "300KiB")
    assert len(select_within(net, "300KiB", **settings_in(str(caught.value)))) == 3


def test_masks_of_another_size_than_sparsity_says():
    with pytest.raises(MemoryError, match="fit") as caught:
        select_within(net_of(60, 10), "2MiB", mask="per_layer")
    assert set(settings_in(str(caught.value))) == {"n_components", "n_top_classes"}


def test_a_disk_that_is_full_is_told_before_any_work(net, monkeypatch):
    needed = needs(N_POOL, N_LABELED, N_CLASSES - 1, 196 - 17, 4, 12)
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(
        MemoryError, match=r"too much for memory, and for the 0.0 KiB free in .*TMPDIR"
    ):
        query(net, max_memory=needed.matrices + 1000)


def test_embeddings_of_an_accelerator_go_to_main_memory_first(monkeypatch):
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(available=1000)
    )
    budget = Budget(500, torch.device("meta"))
    assert budget.empty((2, 1, 5), torch.float32, Needs(40, 100)).device.type == "meta"
    in_memory = budget.empty((100, 1, 1), torch.float32, Needs(400, 101))
    assert in_memory.device.type == "cpu"
    assert budget.place(Needs(900, 101)) == "file"


def test_main_memory_beside_a_gpu_is_pinned_where_it_can_be(monkeypatch):
    budget, asked, full = Budget(500, torch.device("cuda")), [], [False, True]
    plain = torch.empty

    def empty(*args, pin_memory=False, **kwargs):
        asked.append(pin_memory)
        if pin_memory and full.pop(0):
            raise RuntimeError("CUDA error: out of memory")
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", empty)
    for _ in range(2):
        found = budget.empty((100, 1, 1), torch.float32, Needs(400, 101))
        assert found.device.type == "cpu"
    assert asked == [True, True, False]


def test_a_budget_of_what_is_free_where_the_system_does_not_say():
    budget = Budget(None, torch.device("meta"))
    assert budget.n_bytes is None
    budget.check(Needs(10**18, 10**18), 1, 1, str)


def test_many_weights_and_few_samples_need_no_matrix(net):
    """Until F̄ is a mean over samples whose rows are kept for it alone."""
    X, known = vectors(100), vectors(N_LABELED, 1)
    from_rows, from_matrices = (
        FisherMask(0.9, damping=0.1, random_state=0) for _ in range(2)
    )
    assert uses_rows(120, N_CLASSES - 1, 196)
    assert not uses_rows(240, N_CLASSES - 1, 196)
    from_rows.select(net, X, 12, X_labeled=known)
    of_the_same = {"X_labeled": known, "X_target": np.concatenate([X, known])}
    from_matrices.select(net, X, 12, **of_the_same)
    assert from_rows.query_idx_.tolist() == from_matrices.query_idx_.tolist()
    np.testing.assert_allclose(
        from_rows.trace_reductions_, from_matrices.trace_reductions_, rtol=1e-5
    )


@pytest.mark.parametrize("max_samples", [1, 3, 50])
@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("full"),
        RuntimeError("can't allocate memory: full"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasC…`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_a_batch_that_runs_out_of_memory_is_halved(max_samples, error):
    torch.manual_seed(0)
    net, batch, sizes = nn.Linear(5, 3).double().eval(), torch.randn(40, 5).double(), []
    plain = PerSampleGradients(net, net, batch)

    def forward(x):
        sizes.append(len(x))
        if len(x) > max_samples:
            raise error
        return net(x)

    limited = PerSampleGradients(net, forward, batch[:1])
    sizes.clear()
    mask_indices = torch.arange(0, 18, 2)
    torch.testing.assert_close(
        limited.embeddings(batch, mask_indices), plain.embeddings(batch, mask_indices)
    )
    torch.testing.assert_close(
        limited.diagonal_fisher([batch]), plain.diagonal_fisher([batch])
    )
    assert sizes.count(40) == (1 if max_samples < 40 else 2)  # the size is remembered


class Tight(torch.autograd.Function):
    """Nothing, in memory that holds no more than 16 samples under vmap."""

    sizes: ClassVar[list[int]] = []

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g

    @staticmethod
    def vmap(info, in_dims, x):
        Tight.sizes.append(info.batch_size)
        if info.batch_size > 16:
            raise torch.cuda.OutOfMemoryError("full")
        return Tight.apply(x), in_dims[0]


def test_a_batch_that_is_too_large_for_vmap_is_halved():
    """Not taken for a module that vmap cannot do, which would go one sample at a time
    from then on.
    """
    torch.manual_seed(0)
    net, batch = nn.ConvTranspose1d(2, 3, 2).double().eval(), torch.randn(40, 2, 4)
    batch = batch.double()
    plain = PerSampleGradients(net, lambda x: net(x).mean(2), batch)
    expected = plain.embeddings(batch, torch.arange(6))
    limited = PerSampleGradients(net, lambda x: Tight.apply(net(x)).mean(2), batch[:4])
    assert limited.generic == {"weight", "bias"}
    Tight.sizes.clear()
    torch.testing.assert_close(limited.embeddings(batch, torch.arange(6)), expected)
    assert Tight.sizes == [40, 20, 10, 10, 10, 10]


def test_memory_that_does_not_hold_one_sample_is_said():
    net, batch = nn.Linear(5, 3).eval(), torch.randn(4, 5)
    full = False

    def forward(x):
        if full:
            raise torch.cuda.OutOfMemoryError("full")
        return net(x)

    gradients = PerSampleGradients(net, forward, batch)
    full = True
    with pytest.raises(MemoryError, match="ran out on a single sample"):
        gradients.embeddings(batch, torch.arange(3))


def test_other_errors_of_the_net_pass(net):
    gradients = PerSampleGradients(net.module_, net.module_, torch.randn(4, 8))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        gradients.embeddings(torch.randn(4, 9), torch.arange(3))


def test_components_keep_nearly_all_of_the_gain(net):
    """Half of the directions, measured in full: nearly the same reduction as exact
    picks.
    """
    exact = query(net)
    assert (
        query(net, n_components=10**6).query_idx_.tolist() == exact.query_idx_.tolist()
    )
    cut = query(net, n_components=60)
    assert cut.trace_reductions_.sum() == pytest.approx(
        exact.trace_reductions_.sum(), rel=0.1
    )
    assert (
        query(net, n_components=60).query_idx_.tolist() == cut.query_idx_.tolist()
    )  # seeded
    few = query(net, n_components=3)
    assert few.trace_reductions_.sum() < cut.trace_reductions_.sum()


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("n_components", 0, 1), ("n_components", 2.5, 1), ("n_top_classes", 1, 2)],
)
def test_bad_sizes(net, name, value, least):
    with pytest.raises(ValueError, match=f"{name}={value} must be an int >= {least}"):
        query(net, **{name: value})


def test_top_classes_of_all_are_all(net):
    expected = query(net)
    assert (
        query(net, n_top_classes=N_CLASSES + 3).query_idx_.tolist()
        == expected.query_idx_.tolist()
    )
    fewer = query(net, n_top_classes=2)
    assert len(set(fewer.query_idx_)) == 12
    assert not np.allclose(
        fewer.trace_reductions_, expected.trace_reductions_, rtol=1e-3
    )


# What is free, and files.


def test_memory_of_cuda_that_torch_holds_unused_is_free(net):
    """And the cache that the user's other work lives on is left alone."""
    with PretendDevice(free=1000, reserved=500, allocated=200) as device:
        assert free_bytes(device.device) == 1300
        assert Budget(None, device.device).n_bytes == 1040
        assert Budget(None, device.device, n_beside=4, n_on_card=2).n_bytes == 520
        limited = PerSampleGradients(net.module_, net.module_, torch.ones(4, 8))
        limited.memory.max_samples = 4
        limited.memory.halve()  # the pretended device refuses empty_cache
    assert limited.memory.max_samples == 2


def control_group(root, place, line, names, limit, used, cached):
    """A control group as /sys shows it, and this process in it."""
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    with (root / "proc/self/cgroup").open("a") as file:
        file.write(line + "\n")
    folder = root / "sys/fs/cgroup" / place
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


SECOND = ("memory.max", "memory.current", "inactive_file")
FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def test_a_container_s_limit_is_the_memory_that_is_free(tmp_path):
    assert list(_left_to_container(tmp_path)) == []  # no Linux
    control_group(tmp_path, "", "0::/", SECOND, "max", 70, 20)
    assert list(_left_to_container(tmp_path)) == []
    control_group(tmp_path, "a/b", "0::/a/b", SECOND, 100, 70, 20)
    control_group(tmp_path, "a", "1:cpu,cpuacct:/a", SECOND, 90, 85, 20)
    assert sorted(_left_to_container(tmp_path)) == [25, 50]
    assert free_bytes(torch.device("cpu"), tmp_path) == 25


def test_limits_of_the_first_kind_of_control_groups(tmp_path):
    """Their path is the host's, and the container sees its own group at the root."""
    line = "4:cpu,memory:/docker/0123"
    control_group(tmp_path, "memory", line, FIRST, 1000, 400, 100)
    assert list(_left_to_container(tmp_path)) == [700]
    control_group(tmp_path, "memory", "0::/", FIRST, 100, 400, 100)
    assert list(_left_to_container(tmp_path)) == [0]


def test_main_memory_that_is_free_is_what_psutil_says(tmp_path, monkeypatch):
    said = SimpleNamespace(available=123)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: said)
    assert free_bytes(torch.device("cpu"), tmp_path) == 123
    assert free_bytes(torch.device("meta")) is None


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """Where mapped files go; nothing may stay there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 0), (3, 2), (5,), (2, 2**20 + 3)])
@pytest.mark.parametrize("reserves", [True, False, "not here"])
def test_a_mapped_tensor_of_any_shape(disk, monkeypatch, shape, reserves):
    """The room is there before anything is written, also where the system cannot be
    asked for it.
    """
    if not reserves:
        monkeypatch.delattr(os, "posix_fallocate")
    if reserves == "not here":
        error = OSError(errno.EOPNOTSUPP, "Operation not supported")
        monkeypatch.setattr(os, "posix_fallocate", mock.Mock(side_effect=error))
    seen, from_file = [], torch.from_file

    def look(path, **kwargs):
        seen.append(os.stat(path))
        return from_file(path, **kwargs)

    monkeypatch.setattr(torch, "from_file", look)
    found = mapped(shape, torch.float64)
    assert (tuple(found.shape), found.dtype) == (shape, torch.float64)
    assert found.eq(0).all()
    for about in seen:
        assert about.st_size == found.nbytes
        assert about.st_blocks * 512 >= found.nbytes
    assert len(seen) == (found.numel() > 0)


@pytest.mark.parametrize("error", [RuntimeError("unable to mmap"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", [(torch, "from_file"), (os, "posix_fallocate")])
def test_a_file_that_is_not_mapped_leaves_nothing(disk, monkeypatch, error, where):
    monkeypatch.setattr(*where, mock.Mock(side_effect=error))
    with pytest.raises(type(error)):
        mapped((10, 10), torch.float32)


FULL = OSError(errno.ENOSPC, "No space left on device")
TOLD = "take 0.4 KiB, more than .* holds: No space left .*TMPDIR name a larger"


def test_a_disk_that_fills_up_later_is_told_in_words(disk, monkeypatch):
    """Not by a signal that ends the process when a page is written."""
    monkeypatch.setattr(os, "posix_fallocate", mock.Mock(side_effect=FULL))
    with pytest.raises(MemoryError, match=TOLD):
        mapped((10, 10), torch.float32)


def test_so_is_one_that_cannot_be_asked_for_room(monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    file = mock.Mock(write=mock.Mock(side_effect=FULL))
    with pytest.raises(MemoryError, match=TOLD):
        _reserve(file, 400)
