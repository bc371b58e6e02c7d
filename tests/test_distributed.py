"""A pool on several processes: the picks of one, whatever lies where; and what is said
when a process fails.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import distributed_worker as worker
import numpy as np
import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no gloo",
)

N, L = worker.N_POOL, worker.N_LABELED
# How pool and labelled samples lie on the ranks.
SHARDS = {
    2: [([30, 30], [6, 7]), ([53, 7], [0, L]), ([0, N], [L, 0]), ([N, 0], [0, L])],
    4: [([15, 15, 15, 15], [4, 3, 3, 3]), ([0, 3, 57, 0], [0, L, 0, 0])],
}


@pytest.fixture(scope="module")
def context():
    """Processes that start from one which has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed_worker"])
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # older servers look for what they preload on this path alone
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


@pytest.fixture
def play(context, tmp_path):
    """Play a scene on several ranks; what each wrote down, and nobody is left
    behind.
    """

    def play(scene, size, *args, timeout=240, gone=()):
        ranks = [
            context.Process(
                target=worker.work,
                args=(scene, rank, size, str(tmp_path), timeout, *args),
                daemon=True,
            )
            for rank in range(size)
        ]
        try:
            for process in ranks:
                process.start()
            for process in ranks:
                process.join(1_200)
            ends = [process.exitcode for process in ranks]
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
        assert [rank for rank, end in enumerate(ends) if end != 0] == list(gone)
        return [
            json.loads((tmp_path / f"{rank}.json").read_text())
            for rank in range(size)
            if rank not in gone
        ]

    return play


def assert_answers_of_one_process(play, size, what, scene=worker.cases, *args):
    found = play(scene, size, what, *args)
    for (name, counts, labeled), *answers in zip(what, *found, strict=True):
        expected = worker.run_case(name, 0, [N], [L])
        shown = f"{name} {counts} {labeled}"
        for answer in answers:
            assert answer["picks"] == expected["picks"], shown
            assert answer["mask"] == expected["mask"], shown
            np.testing.assert_allclose(
                answer["gains"], expected["gains"], rtol=1e-7, err_msg=shown
            )
        assert all(answer == answers[0] for answer in answers), shown


def test_two_processes_pick_what_one_picks(play):
    what = [("plain", *shards) for shards in SHARDS[2]]
    what += [(name, *SHARDS[2][i % 4]) for i, name in enumerate(worker.CASES)]
    assert_answers_of_one_process(play, 2, what)


def test_four_processes_pick_what_one_picks(play):
    what = [("plain", *shards) for shards in SHARDS[4]]
    what += [(name, *SHARDS[4][1]) for name in ("ties", "candidates", "directions")]
    assert_answers_of_one_process(play, 4, what)


@pytest.mark.parametrize(
    ("nccl", "names"),
    [(True, ["candidates", "random ties"]), (False, ["directions"])],
    ids=["NCCL", "gloo"],
)
def test_two_processes_with_a_device_each_pick_what_one_picks(play, nccl, names):
    """NCCL takes no tensor of main memory, gloo few of a device."""
    what = [(name, *SHARDS[2][i]) for i, name in enumerate(names)]
    assert_answers_of_one_process(play, 2, what, worker.cases_on_device, nccl)


@pytest.mark.slow
@pytest.mark.timeout(1500)  # all cases, each with processes that wait for each other
@pytest.mark.parametrize("nccl", [True, False], ids=["NCCL", "gloo"])
def test_every_case_with_a_device_each(play, nccl):
    what = [(name, *SHARDS[2][i % 4]) for i, name in enumerate(worker.CASES)]
    assert_answers_of_one_process(play, 2, what, worker.cases_on_device, nccl)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("size", [2, 4])
def test_every_case_on_every_kind_of_shards(play, size):
    what = [(name, *shards) for name in worker.CASES for shards in SHARDS[size]]
    assert_answers_of_one_process(play, size, what)


def test_an_error_of_one_rank_is_raised_by_all(play):
    """One after the other, in one group: each time it is in step again."""
    answers = list(zip(*play(worker.errors, 2), strict=True))
    alone = [
        "The net's outputs hold NaN",
        "X_pool holds NaN",
        "max_memory allows",
    ]
    steps = ["'mask': ValueError", "'start': ValueError", "'start': MemoryError"]
    for message, step in zip(alone, steps, strict=True):
        first, last = answers.pop(0)
        assert re.search(message, last)
        assert re.fullmatch(
            f"RuntimeError: Rank 1 of 2 failed in the step {step}: .*{message}.*", first
        )
    of_both = [
        "n_instances is 3 on rank 0 and 4 on rank 1",
        "damping is 1.0 on rank 0 and 2.0 on rank 1",
        "0.weight of the net differs between rank 0 and rank 1",
        "whether there are candidates is False on rank 0 and True on rank 1",
        "n_instances=3 exceeds the 2 candidates; lower n_instances, or propose more",
        "Under a process group X_labeled must be this rank's part",
        "X_pool is empty",
        "n_instances=41 exceeds the pool of 40 samples",
    ]
    for message in of_both:
        first, last = answers.pop(0)
        assert first.startswith(f"ValueError: {message}")
        assert last == first
    for first, last in answers[:2]:  # drawn by rank 0; proposed by a strategy
        assert len(first) == 3
        assert last == first
    # A call in modAL's form asks for its own process alone.
    assert [sorted(picks) for picks in answers[2]] == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]


def test_a_rank_that_dies_stops_the_others(play):
    found = play(worker.dies, 3, timeout=20, gone=[2])
    for rank, message in enumerate(found):
        assert message.startswith(
            f"RuntimeError: Rank {rank} of 3 lost the others in the step 'selection': "
        )
        assert "Another process has died or raised" in message


def test_a_rank_that_stays_away_stops_the_others_at_the_timeout(play, context):
    found, _ = play(worker.stays_away, 2, context.Event(), timeout=4)
    assert found.startswith(
        "RuntimeError: Rank 0 of 2 lost the others in the step 'start': "
    )
    assert "Timed out" in found


@pytest.mark.slow
def test_the_example_under_torchrun_picks_what_one_process_picks():
    example = Path(__file__).parents[1] / "examples" / "distributed.py"
    assert len(example.read_text().splitlines()) < 80
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = set()
    for launcher in ([], torchrun):
        run = [sys.executable, *launcher, str(example)]
        shown = subprocess.run(
            run, capture_output=True, text=True, timeout=500, check=True
        ).stdout
        found |= set(re.findall(r"all ranks pick (\[.*?\])", shown))
    assert len(found) == 1
