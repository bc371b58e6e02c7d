"""What there is to see on a GPU: that picks are those of the CPU, what a query costs,
and that processes share a pool over NCCL and gloo.

    make gpu                    # tests, bench and distributed, one after the other
    make gpu PART=bench         # one of them: under eight minutes each

Installs nothing: it runs on the Python that it is given (`make gpu PYTHON=...`), which
needs this package's dependencies, and pytest for the tests. What it finds is appended
to docs/results/gpu.txt. Without CUDA it ends with an error and writes nothing.

`--device cpu --scale 0.01` tries the script itself on a machine without a GPU, and
prints instead of writing, unless `--out` names a file.
"""

import argparse
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from skorch import NeuralNetClassifier
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fishermask_sk import FisherMask, ResNet18Classifier
from fishermask_sk.datasets import load_images
from fishermask_sk.distributed import Group
from fishermask_sk.strategy import fisher_mask

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "results" / "gpu.txt"
PARTS = ("tests", "bench", "distributed")
# A part that takes longer is stopped, and the file says so.
LIMIT_S = 460
N_CLASSES = 10


def say(*words):
    print(*words, flush=True)


def images(n):
    """FashionMNIST in a fixed order, else random images of its shape."""
    rng = np.random.default_rng(0)
    try:
        data = load_images("fashion-mnist", download_if_missing=False)
    except (OSError, RuntimeError):
        X = rng.random((n, 1, 28, 28), dtype=np.float32)
        return X, rng.integers(0, N_CLASSES, n), "random images of 28×28"
    X = np.concatenate([data.X_train, data.X_test])
    y = np.concatenate([data.y_train, data.y_test])
    order = rng.permutation(len(X))[:n]
    return X[order], y[order], "FashionMNIST"


# Tests: those of the suite that run on every device, on this one.


def tests(device, scale):
    chosen = [
        *("test_accelerator.py", "test_devices.py", "test_gradients.py"),
        *("test_memory.py", "test_selection.py", "test_distributed.py"),
    ]
    # Without the project's own options, whose plugins need not be here.
    command = [sys.executable, "-m", "pytest", "-q", "-x" if scale < 1 else "-ra"]
    command += ["-o", "addopts=--import-mode=importlib", "-o", "pythonpath=tests"]
    command += ["-p", "no:cacheprovider", "-W", "ignore", "-k", device]
    command += [f"tests/{name}" for name in chosen]
    say(f"pytest -k {device}, {', '.join(chosen)}")
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    for line in (ended.stdout + ended.stderr).splitlines()[-40:]:
        say(" ", line)
    if ended.returncode:
        raise SystemExit(f"pytest ended with {ended.returncode}")


# Bench: whole FashionMNIST, next to the forward pass.


def waited(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def forward_seconds(net, X, device):
    start = waited(device)
    net.predict_proba(X)
    return waited(device) - start


def bench(device, scale):
    n_pool, b = max(60, int(60_000 * scale)), max(5, int(250 * scale))
    width = 16 if scale == 1 else 2  # of a trial of the script
    X, y, source = images(n_pool + 250)
    known, X = X[:250], X[250:]
    net = ResNet18Classifier(
        width=width, head_bias=False, classes=range(N_CLASSES), device=device,
        random_state=0, max_epochs=2, min_steps=20,
    ).fit(known, y[:250])  # fmt: skip
    say(f"{source}, N = {len(X):,}, L = 250, b = {b}, ResNet-18 of width {width}")
    forward_seconds(net, X[:500], device)  # whatever is only slow once
    forward = forward_seconds(net, X, device)
    say(f"forward pass over the pool: {forward:.2f} s")
    two = {"candidates": 10, "n_information_samples": 2_048, "n_mask_samples": 256}
    settings: dict[str, dict[str, Any]] = {
        "the last layer": {"layers": "last"},
        "two stages": two,
        "all layers, exact": {},
    }
    for name, params in settings.items():
        strategy = FisherMask(random_state=0, **params)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = waited(device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            strategy.select(net, X, b, X_labeled=known)
        took = waited(device) - start
        steps = ", ".join(f"{k} {v:.1f}" for k, v in strategy.timings_.items())
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        say(
            f"{name}: k = {len(strategy.mask_indices_):,}, {took:.1f} s, "
            f"{took / forward:.1f} × the forward pass ({steps}); "
            f"{peak / 2**30:.2f} GiB on the device"
        )
    asked(net, X[: max(60, int(8_000 * scale))], known, device, scale)


def asked(net, X, known, device, scale):
    """What a pick asks of the device: the difference of two numbers of picks."""
    few, many = (5, 10) if scale < 1 else (20, 60)
    found = []
    for b in (few, many):
        on = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
        with profile(activities=[on]) as profiled, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            FisherMask(random_state=0).select(net, X, b, X_labeled=known)
        calls = Counter({e.key: e.count for e in profiled.key_averages()})
        launches = sum(n for key, n in calls.items() if "LaunchKernel" in key)
        waits = sum(n for key, n in calls.items() if "Synchronize" in key)
        found.append((launches, waits))
    launches, waits = np.diff(found, axis=0)[0] / (many - few)
    say(
        f"a pick of {len(X):,} samples: {launches:.0f} launches, {waits:.1f} "
        "synchronisations"
    )


# Distributed: picks of several processes are those of one.


def small_net(device):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, N_CLASSES))
    return NeuralNetClassifier(
        module, criterion=nn.CrossEntropyLoss, train_split=None, device=device,
        verbose=0,
    ).initialize()  # fmt: skip


def ask(rank, size, device, n):
    X = np.random.default_rng(0).normal(size=(n, 20)).astype("float32")
    own = slice(rank * n // size, (rank + 1) * n // size)
    start, picks = waited(device), {}
    for name, of_call in (
        ("picks", {}),
        ("among candidates", {"candidates": np.arange(0, own.stop - own.start, 3)}),
        ("with random ties", {"random_tie_break": True}),
    ):
        strategy = FisherMask(0.9, random_state=0)
        found = strategy.select(
            small_net(device), X[own], 20, X_labeled=X[:0], **of_call
        )
        if name != "among candidates" or n % (3 * size) == 0:
            picks[name] = found.tolist()
    return picks, waited(device) - start


def rank_of_group(rank, size, backend, device, n, folder):
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    # A group of one would be no group to a query.
    with mock.patch.object(fisher_mask, "all_processes", Group):
        found = ask(rank, size, device, n)
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def groups(device):
    """Backends and numbers of processes: NCCL takes one process a GPU."""
    if device == "cpu":
        return [("gloo", 1), ("gloo", 2)]
    n_gpus = torch.cuda.device_count()
    return [("nccl", min(n_gpus, 2)), ("gloo", 2)]


def distributed(device, scale):
    n, different = 6 * max(20, int(2_000 * scale)), []
    expected, seconds = ask(0, 1, device, n)
    say(f"one process: {n:,} samples, three queries of 20 picks, {seconds:.1f} s")
    context = multiprocessing.get_context("spawn")
    for backend, size in groups(device):
        name = f"{backend}, {size} process{'es' * (size > 1)}"
        with tempfile.TemporaryDirectory() as folder:
            ranks = [
                context.Process(
                    target=rank_of_group, args=(r, size, backend, device, n, folder)
                )
                for r in range(size)
            ]
            for each in ranks:
                each.start()
            for each in ranks:
                each.join()
            if any(each.exitcode for each in ranks):
                say(f"{name}: ended with {[each.exitcode for each in ranks]}")
                different.append(name)
                continue
            found = [torch.load(Path(folder, f"{r}.pt")) for r in range(size)]
        same = all(picks == expected for picks, _ in found)
        say(
            f"{name}: {'the same picks' if same else 'OTHER PICKS'}, "
            f"{found[0][1]:.1f} s"
        )
        different += [] if same else [name]
    if different:
        raise SystemExit(f"not as one process: {', '.join(different)}")


# The file.


def header(part, device):
    name = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"== {part}: {now}; {torch.cuda.device_count() if device == 'cuda' else 0} × "
        f"{name}; Python {platform.python_version()}, torch {torch.__version__}, CUDA "
        f"{torch.version.cuda}, numpy {np.__version__}"
    )


def run(part, device, scale, out, limit=LIMIT_S):
    """One part in a process of its own, written down line by line; whether it went
    well.
    """
    command = [sys.executable, __file__, part, "--device", device]
    command += ["--scale", str(scale), "--here"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    start, lines = time.monotonic(), [header(part, device)]
    with tempfile.TemporaryFile("w+") as said:
        try:
            code = subprocess.run(
                command, stdout=said, stderr=subprocess.STDOUT, timeout=limit,
                env=os.environ | {"PYTHONPATH": path},
            ).returncode  # fmt: skip
            end = "done" if code == 0 else f"FAILED with {code}"
        except subprocess.TimeoutExpired:
            code, end = 1, "STOPPED, out of time"
        said.seek(0)
        lines += said.read().splitlines()
    lines.append(f"{end} after {time.monotonic() - start:.0f} s")
    say("\n".join(lines))
    if out is not None:
        with out.open("a") as file:
            file.write("\n".join(lines) + "\n\n")
    return code == 0


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=" or ".join(PARTS))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"PART={part} is unknown; use one of {', '.join(PARTS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "make gpu needs a GPU, and this torch sees none "
            f"(torch {torch.__version__}, CUDA {torch.version.cuda}); nothing was run "
            "and nothing written. --device cpu tries the script itself."
        )
    if args.here:
        return globals()[args.parts[0]](args.device, args.scale)
    out = args.out or (OUT if args.device == "cuda" else None)
    found = [run(p, args.device, args.scale, out) for p in args.parts or PARTS]
    if not all(found):
        raise SystemExit(1)
    return None


if __name__ == "__main__":
    main()
