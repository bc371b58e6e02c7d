"""What a query costs next to the forward pass over the pool that margin sampling makes.

    python benchmarks/price.py            # all rows: hours on two cores
    python benchmarks/price.py narrow million

Each row runs in a process of its own. Each of its settings is printed and goes to
docs/benchmarks/price.md as soon as it is done; `--resume` leaves out those that are
there, and without it a row begins anew. Seconds are given of a clock and of the
processor: on a machine that does other work as well, the ratio of the latter holds.
`--scale 0.1` takes a tenth of each pool, and of two stages, to see that a row works;
such a row is printed and not written.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from query import (
    DEVICE,
    FOLDER,
    PeakAnonymous,
    load,
    machine,
    train,
    wait,
)
from torch import nn

from fishermask_sk import FisherMask, ResNet18Classifier, as_estimator
from fishermask_sk.nets.skorch_adapter import fitted_net

TABLE = FOLDER / "price.json"
HEADER = (
    "| pool and net | setting | forward pass, s | query, s | query / forward | mask, s "
    "| candidates, s | embeddings, s | check, s | selection, s | GiB more | forward "
    "pass, processor s | query, processor s | query / forward, processor |\n"
    "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)
STEPS = ("mask", "candidates", "embeddings", "check", "selection")


class Both(NamedTuple):
    """Seconds of a clock, and of all threads of this process."""

    clock: float
    processor: float


def timed(function):
    """One run by both."""
    wait()
    start = time.perf_counter(), time.process_time()
    function()
    wait()
    return Both(time.perf_counter() - start[0], time.process_time() - start[1])


def forward_seconds(estimator, X):
    """One pass over the pool as a query makes it: scores in batches of 128."""
    fitted = fitted_net(estimator)
    fitted.module.eval()

    def run():
        dataset, _ = fitted.dataset(X, "X_pool")
        with torch.no_grad():
            for batch in fitted.batches(dataset, 128):
                fitted.logits(batch)

    return timed(run)


def rows_of(source, net, estimator, X_pool, X_labeled, n_instances, settings, done):
    """A line of the table for each setting that is not done, with the mean of a forward
    pass before it and one after it.
    """
    pool = f"{net}, N = {len(X_pool):,}, b = {n_instances}"
    for name, params in settings.items():
        if name in done:
            continue
        before = forward_seconds(estimator, X_pool)
        strategy = FisherMask(**{"random_state": 0, **params})
        with warnings.catch_warnings(record=True) as said, PeakAnonymous() as found:
            warnings.simplefilter("always")
            took = timed(
                partial(
                    strategy.select,
                    estimator,
                    X_pool,
                    n_instances,
                    X_labeled=X_labeled,
                )
            )
        for warning in said:
            print(f"  {name}: {warning.message}", file=sys.stderr)
        after = forward_seconds(estimator, X_pool)
        yield {
            "name": name,
            "machine": machine(source),
            "pool": pool,
            "setting": f"{name} (k = {len(strategy.mask_indices_):,})",
            "forward": (before.clock + after.clock) / 2,
            "forward_processor": (before.processor + after.processor) / 2,
            "query": took.clock,
            "query_processor": took.processor,
            "grown": found.grown / 2**30,
            "timings": {**strategy.timings_, "check": strategy.check_seconds_},
        }


def of(n, scale):
    """A number of samples at a scale."""
    return max(1, round(n * scale))


def two_stages_of(scale):
    """As the page on choosing settings has them, at a scale."""
    return {
        "candidates": 10,
        "n_information_samples": of(2_048, scale),
        "n_mask_samples": of(256, scale),
    }


def fashion(n_pool, scale, width=16):
    """A net, its training images, those of a pool, and where they come from."""
    X, y, X_pool, _, source = load(of(n_pool, scale), max(16, of(250, scale)))
    few = {} if width == 16 else {"max_epochs": 2, "min_steps": 8}
    return train(X, y, width=width, **few), X, X_pool, source


def random_images(n_pool, scale, side, n_classes):
    """A ResNet-18 of width 64 that has seen two batches, and random images."""
    rng = np.random.default_rng(0)
    X = rng.random((max(16, of(250, scale)), 3, side, side), dtype=np.float32)
    X_pool = rng.random((of(n_pool, scale), 3, side, side), dtype=np.float32)
    net = ResNet18Classifier(
        width=64,
        classes=range(n_classes),
        random_state=0,
        device=DEVICE,
        max_epochs=1,
        min_steps=2,
    ).fit(X, np.arange(len(X)) % n_classes)
    return net, X, X_pool


def narrow(scale, done):
    net, X, X_pool, source = fashion(5_500, scale)
    settings = {
        "all layers": {"n_mask_samples": of(1_024, scale)},
        "256 mask samples": {"n_mask_samples": of(256, scale)},
    }
    name, b = "narrow ResNet-18, 28×28", of(250, scale)
    yield from rows_of(source, name, net, X_pool, X, b, settings, done)


def two_stages(scale, done):
    net, X, X_pool, source = fashion(50_000, scale)
    two = two_stages_of(scale)
    settings = {
        "two stages": two,
        "two stages, 1,024 mask samples": two | {"n_mask_samples": of(1_024, scale)},
        "two stages, 3 top classes": two | {"n_top_classes": 3},
    }
    name, b = "narrow ResNet-18, 28×28", of(250, scale)
    yield from rows_of(source, name, net, X_pool, X, b, settings, done)


LAST = {"layers": "last", "sparsity": 1.0}


def last_layer(scale, done):
    net, X, X_pool, source = fashion(50_000, scale, width=64)
    settings, b = {"the last layer": LAST}, of(100, scale)
    yield from rows_of(source, "ResNet-18, 28×28", net, X_pool, X, b, settings, done)


def wide(scale, done):
    net, X, X_pool = random_images(20_000, scale, 64, 10)
    settings = {
        "the last layer": LAST,
        "two stages": two_stages_of(scale),
        "the defaults": {"n_mask_samples": of(1_024, scale)},
    }
    name, b = "ResNet-18, 64×64", of(200, scale)
    yield from rows_of("random images", name, net, X_pool, X, b, settings, done)


def hundred_classes(scale, done):
    net, X, X_pool = random_images(50_000, scale, 32, 100)
    settings = {
        "the last layer, 5 top classes": {
            "layers": "last",
            "sparsity": 5_000,
            "n_top_classes": 5,
            "n_mask_samples": of(1_024, scale),
        }
    }
    name, b = "ResNet-18, 32×32, 100 classes", of(100, scale)
    yield from rows_of("random images", name, net, X_pool, X, b, settings, done)


def linear_head(n_classes=10, d=512):
    """On features; nothing is trained."""
    torch.manual_seed(0)
    module = nn.Linear(d, n_classes)
    nn.init.normal_(module.weight, std=2 / d**0.5)
    return as_estimator(module, classes=range(n_classes), device=DEVICE)


def features(scale, done):
    rng = np.random.default_rng(0)
    X_pool = rng.normal(size=(of(30_000, scale), 512)).astype(np.float32)
    X = rng.normal(size=(of(250, scale), 512)).astype(np.float32)
    name, b = "linear head on 512 features", of(50, scale)
    settings = {"all weights": {"sparsity": 1.0}}
    yield from rows_of(
        "random features", name, linear_head(), X_pool, X, b, settings, done
    )


def million(scale, done):
    n = of(1_000_000, scale)
    rng = np.random.default_rng(0)
    X = rng.normal(size=(of(250, scale), 512)).astype(np.float32)
    settings = {
        "100·b candidates": {"sparsity": 1.0, "candidates": 100},
        "every sample": {"sparsity": 1.0},
    }
    name, b = "linear head on 512 features, mapped", of(50, scale)
    with tempfile.TemporaryDirectory() as folder:
        X_pool = np.lib.format.open_memmap(
            Path(folder) / "pool.npy", mode="w+", dtype=np.float32, shape=(n, 512)
        )
        for start in range(0, n, 50_000):
            part = X_pool[start : start + 50_000]
            part[:] = rng.normal(size=part.shape)
        X_pool.flush()
        yield from rows_of(
            "random features", name, linear_head(), X_pool, X, b, settings, done
        )


ROWS = {
    "narrow": narrow,
    "two-stages": two_stages,
    "last-layer": last_layer,
    "wide": wide,
    "hundred-classes": hundred_classes,
    "features": features,
    "million": million,
}


def as_line(row):
    steps = [
        f"{row['timings'][step]:.1f}" if step in row["timings"] else ""
        for step in STEPS
    ]
    by_processor = ["", "", ""]
    if "query_processor" in row:
        forward, query = row["forward_processor"], row["query_processor"]
        by_processor = [f"{forward:.1f}", f"{query:.1f}", f"{query / forward:.1f}"]
    return (
        f"| {row['pool']} | {row['setting']} | {row['forward']:.1f} | "
        f"{row['query']:.1f} | {row['query'] / row['forward']:.1f} | "
        f"{' | '.join(steps)} | {row['grown']:.1f} | {' | '.join(by_processor)} |"
    )


def table_so_far():
    """Lists of lines, by row."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def keep(name, rows):
    """Put these lines in the place of those of the same row, and write the table."""
    table = table_so_far()
    table[name] = rows
    FOLDER.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    shown = [n for n in ROWS if n in table]
    lines = [
        "# A query next to the forward pass over its pool",
        "",
        "`python benchmarks/price.py`. The check is part of the query; it stands in a "
        "column of its own as well. Memory is anonymous memory above what the process "
        "held before the query. Where other programs ran, the ratio of processor "
        "seconds, those of all threads, is the one to read.",
        "",
        HEADER,
        *(as_line(row) for n in shown for row in table[n]),
        "",
        *(f"{n}: {table[n][-1]['machine']}  " for n in shown),
    ]
    (FOLDER / "price.md").write_text("\n".join(lines) + "\n")


def run(name, scale, resume):
    """One row, line by line."""
    rows = table_so_far().get(name, []) if resume else []
    print(HEADER, flush=True)
    for row in ROWS[name](scale, {each["name"] for each in rows}):
        print(as_line(row), flush=True)
        rows.append(row)
        if scale == 1:
            keep(name, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], default=[])
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--resume", action="store_true", help="leave out what is done")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        torch.set_flush_denormal(True)
        run(args.rows[0], args.scale, args.resume)
        return
    options = [f"--scale={args.scale}", *["--resume"] * args.resume, "--here"]
    for name in args.rows or ROWS:
        subprocess.run([sys.executable, __file__, name, *options], check=True)


if __name__ == "__main__":
    main()
