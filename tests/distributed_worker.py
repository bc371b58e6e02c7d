"""One process of a group, for tests/test_distributed.py: makes a net, takes its part of
the samples and asks.
"""

import json
import os
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch._dynamo  # a first query would load it, seconds for each process
import torch.distributed as dist
from pretend_device import PretendDevice, pretend_nccl
from skorch import NeuralNetClassifier
from torch import nn

from fishermask_sk import FisherMask
from fishermask_sk.baselines import margin_sampling

N_POOL, N_LABELED, N_CLASSES = 60, 13, 4


def make_net(seed=0):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, N_CLASSES)).double()
    net = NeuralNetClassifier(
        module, criterion=nn.CrossEntropyLoss, verbose=0, train_split=None
    )
    return net.initialize()


def samples(n, seed):
    return np.random.default_rng(seed).normal(size=(n, 5))


def part(X, counts, rank):
    """The rows of one rank."""
    start = sum(counts[:rank])
    return X[start : start + counts[rank]]


def as_pool(X, kind):
    if kind == "dataset":
        return torch.utils.data.TensorDataset(torch.as_tensor(X), torch.zeros(len(X)))
    return X


def ask(
    rank,
    counts,
    labeled_counts,
    strategy,
    kind="array",
    n_instances=9,
    n_proposed=None,
    n_target=0,
    weighted=False,
    **kwargs,
):
    """A query of this rank; without a group (counts of one rank) that of one
    process.
    """
    X, known = samples(N_POOL, 1), samples(N_LABELED, 2)
    if kind == "tied":
        X = X[np.arange(N_POOL) % 7]
    if kind == "equal":
        X = X[np.zeros(N_POOL, dtype=int)]
    own = as_pool(part(X, counts, rank), kind)
    if n_proposed is not None:
        kwargs["candidates"] = np.flatnonzero(
            part(np.arange(N_POOL) % N_POOL < n_proposed, counts, rank)
        )
    n_averaged = N_POOL
    if n_target:  # dealt out anew, so that a rank may have a target and no pool
        n_averaged, counts = n_target, [n_target // len(counts)] * len(counts)
        counts[0] += n_target - sum(counts)
        kwargs["X_target"] = part(samples(n_target, 3), counts, rank)
    if weighted:
        weights = np.random.default_rng(5).uniform(size=n_averaged)
        kwargs["target_weight"] = part(weights, counts, rank)
    strategy.select(
        make_net(),
        own,
        n_instances,
        X_labeled=part(known, labeled_counts, rank),
        **kwargs,
    )
    return {
        "picks": strategy.query_idx_.tolist(),
        "gains": strategy.trace_reductions_.tolist(),
        "mask": strategy.mask_indices_.tolist(),
    }


CASES = {
    "plain": {},
    "dataset": {"kind": "dataset"},
    "oversampled": {"oversample": 2.0},
    "ties": {"kind": "tied", "n_instances": 30},
    "random ties": {"kind": "tied", "n_instances": 30, "random_tie_break": True},
    "few to rank": {"n_mask_samples": 20},
    "random mask": {"mask": "random"},
    "float64 alone": {"damping": 1e-3, "n_instances": 25},
    "all": {"n_instances": N_POOL},
    "directions": {"n_components": 12},
    "streamed": {"max_memory": 10**6},
    "candidates": {"n_proposed": 31},
    "target": {"n_target": 21},
    "weighted target": {"n_target": 21, "weighted": True, "n_mask_samples": 9},
    "a target of one": {"n_target": 1},
    "weighted pool": {"weighted": True},
    "two stages": {"candidates": 3, "n_information_samples": 25},
    "no labels": {"no_labels": True},
    "equal": {"kind": "equal"},
}
OF_CALL = {
    "kind",
    "n_instances",
    "n_proposed",
    "n_target",
    "random_tie_break",
    "weighted",
}


def run_case(name, rank, counts, labeled_counts):
    settings = dict(CASES[name])
    if settings.pop("no_labels", False):
        labeled_counts = [0] * len(labeled_counts)
    of_call = {key: settings.pop(key) for key in OF_CALL & settings.keys()}
    strategy = FisherMask(0.8, **{"damping": 0.5, "random_state": 0, **settings})
    return ask(rank, counts, labeled_counts, strategy, **of_call)


def join_group(rank, size, folder, timeout):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )


def answer(function, rank, *args):
    """What a rank found, or the error that it raised."""
    try:
        return function(rank, *args)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"


def work(scene, rank, size, folder, timeout, *args):
    """Play a scene as one rank of a group, and write down what came of it."""
    join_group(rank, size, folder, timeout)
    found = scene(rank, size, *args)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def cases(rank, size, what):
    found = [run_case(name, rank, counts, labeled) for name, counts, labeled in what]
    return found


def cases_on_device(rank, size, what, nccl):
    """The same with nets on a pretended device, over gloo or what stands in for
    NCCL.
    """
    plain = make_net
    with ExitStack() as stack:
        device = stack.enter_context(PretendDevice())
        stack.enter_context(pretend_nccl() if nccl else nullcontext())
        adopted = lambda seed=0: device.adopt(plain(seed))  # noqa: E731
        stack.enter_context(mock.patch.dict(globals(), make_net=adopted))
        return [run_case(name, rank, *shards) for name, *shards in what]


def errors(rank, size):
    """One rank is wrong at a time, or asks otherwise; the group goes on with the next
    question.
    """
    X, strategy = samples(20, 1), FisherMask(0.8, random_state=0)
    bad = X.copy()
    bad[7] = np.nan
    bad = as_pool(bad, "dataset")

    def try_out(
        rank, X_pool=X, net=None, n_instances=3, X_labeled=X[:0], params=None, **kwargs
    ):
        chosen = FisherMask(0.8, **params) if params else strategy
        return chosen.select(
            net or make_net(), X_pool, n_instances, X_labeled=X_labeled, **kwargs
        ).tolist()

    class Learner:
        estimator, X_training = make_net(), X

        def query(self):
            """ModAL's learners have one."""

    last = rank == size - 1
    random_mask = {"mask": "random"}
    return [
        answer(partial(try_out, X_pool=bad if last else X, params=random_mask), rank),
        answer(partial(try_out, X_pool=X * np.nan if last else X), rank),
        answer(partial(try_out, params={"max_memory": 10 if last else "1GiB"}), rank),
        answer(partial(try_out, n_instances=3 + last), rank),
        answer(partial(try_out, params={"damping": 1.0 + last}), rank),
        answer(partial(try_out, net=make_net(int(last))), rank),
        answer(partial(try_out, candidates=[1] if last else None), rank),
        answer(partial(try_out, candidates=[1]), rank),
        answer(partial(try_out, net=Learner(), X_labeled=None), rank),
        answer(partial(try_out, X_pool=X[:0]), rank),
        answer(partial(try_out, n_instances=1 + size * len(X)), rank),
        answer(partial(try_out, params={"random_state": None}), rank),
        answer(
            partial(try_out, candidates=partial(margin_sampling, n_instances=3)), rank
        ),
        answer(
            lambda rank: strategy(
                make_net(), X[: 4 + rank], 4 + rank, X_labeled=X[:0]
            ).tolist(),
            rank,
        ),
    ]


def dies(rank, size):
    """The last rank is gone instead of being told the rows of the second pick."""
    broadcast, picks = dist.broadcast, []

    def told_or_dead(rows, source):
        picks.append(source)
        return os._exit(3) if len(picks) == 2 else broadcast(rows, source)

    if rank == size - 1:
        dist.broadcast = told_or_dead
    return answer(
        partial(run_case, "plain"),
        rank,
        [N_POOL // size] * size,
        [N_LABELED] + [0] * (size - 1),
    )


def stays_away(rank, size, end):
    """The last rank does not call, and lives on."""
    if rank == size - 1:
        end.wait(120)
        return None
    found = answer(
        partial(run_case, "plain"),
        rank,
        [N_POOL // size] * size,
        [N_LABELED] + [0] * (size - 1),
    )
    end.set()
    return found
