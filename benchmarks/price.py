"""What a query costs next to the forward pass over the pool that margin sampling makes.

    python benchmarks/price.py            # all rows: hours on two cores
    python benchmarks/price.py narrow million

Each row runs in a process of its own, prints itself, and goes to
docs/benchmarks/price.md, where rows that were not run again stay. `--scale 0.1` takes a
tenth of each pool, to see that a row works; such a row is printed and not written.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from query import (
    DEVICE,
    FOLDER,
    PeakAnonymous,
    load,
    machine,
    timed,
    train,
)
from torch import nn

from fishermask_sk import FisherMask, ResNet18Classifier, as_estimator
from fishermask_sk.nets.skorch_adapter import fitted_net

TABLE = FOLDER / "price.json"
HEADER = (
    "| pool and net | setting | forward pass, s | query, s | query / forward | mask, s "
    "| candidates, s | embeddings, s | check, s | selection, s | GiB more |\n"
    "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)
STEPS = ("mask", "candidates", "embeddings", "check", "selection")


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


def rows_of(pool_and_net, estimator, X_pool, X_labeled, n_instances, settings):
    """A line of the table for each setting; the forward pass before and after them."""
    before = forward_seconds(estimator, X_pool)
    queries = []
    for name, params in settings.items():
        strategy = FisherMask(**{"random_state": 0, **params})
        with warnings.catch_warnings(record=True) as said, PeakAnonymous() as found:
            warnings.simplefilter("always")
            start = time.perf_counter()
            strategy.select(estimator, X_pool, n_instances, X_labeled=X_labeled)
            took = time.perf_counter() - start
        for warning in said:
            print(f"  {name}: {warning.message}", file=sys.stderr)
        queries.append((name, strategy, took, found.grown))
    forward = (before + forward_seconds(estimator, X_pool)) / 2
    return [
        {
            "pool": f"{pool_and_net}, N = {len(X_pool):,}, b = {n_instances}",
            "setting": f"{name} (k = {len(strategy.mask_indices_):,})",
            "forward": forward,
            "query": took,
            "grown": grown / 2**30,
            "timings": {**strategy.timings_, "check": strategy.check_seconds_},
        }
        for name, strategy, took, grown in queries
    ]


def fashion(n_pool, width=16):
    X, y, X_pool, _, source = load(n_pool)
    few = {} if width == 16 else {"max_epochs": 2, "min_steps": 8}
    return train(X, y, width=width, **few), X, X_pool, source


def narrow(scale):
    net, X, X_pool, source = fashion(int(5_500 * scale))
    settings = {"all layers": {}, "256 mask samples": {"n_mask_samples": 256}}
    return source, rows_of("narrow ResNet-18, 28×28", net, X_pool, X, 250, settings)


def two_stages(scale):
    net, X, X_pool, source = fashion(int(50_000 * scale))
    b = max(1, int(250 * scale))
    two = {"candidates": 10, "n_information_samples": 2_048, "n_mask_samples": 256}
    settings = {
        "two stages": two,
        "two stages, 1,024 mask samples": two | {"n_mask_samples": 1_024},
        "two stages, 3 top classes": two | {"n_top_classes": 3},
    }
    return source, rows_of("narrow ResNet-18, 28×28", net, X_pool, X, b, settings)


def last_layer(scale):
    net, X, X_pool, source = fashion(int(50_000 * scale), width=64)
    settings = {"the last layer": {"layers": "last", "sparsity": 1.0}}
    return source, rows_of("ResNet-18, 28×28", net, X_pool, X, 100, settings)


def wide(scale):
    rng = np.random.default_rng(0)
    X = rng.random((250, 3, 64, 64), dtype=np.float32)
    X_pool = rng.random((int(20_000 * scale), 3, 64, 64), dtype=np.float32)
    net = ResNet18Classifier(
        width=64,
        classes=range(10),
        random_state=0,
        device=DEVICE,
        max_epochs=1,
        min_steps=2,
    ).fit(X, np.arange(250) % 10)
    two = {"candidates": 10, "n_information_samples": 2_048, "n_mask_samples": 256}
    settings = {
        "the last layer": {"layers": "last", "sparsity": 1.0},
        "two stages": two,
        "the defaults": {},
    }
    return "random images", rows_of("ResNet-18, 64×64", net, X_pool, X, 200, settings)


def hundred_classes(scale):
    rng = np.random.default_rng(0)
    X = rng.random((500, 3, 32, 32), dtype=np.float32)
    X_pool = rng.random((int(50_000 * scale), 3, 32, 32), dtype=np.float32)
    net = ResNet18Classifier(
        width=64,
        classes=range(100),
        random_state=0,
        device=DEVICE,
        max_epochs=1,
        min_steps=2,
    ).fit(X, np.arange(500) % 100)
    settings = {
        "the last layer, 5 top classes": {
            "layers": "last",
            "sparsity": 5_000,
            "n_top_classes": 5,
        }
    }
    return "random images", rows_of(
        "ResNet-18, 32×32, 100 classes", net, X_pool, X, 100, settings
    )


def linear_head(n_classes=10, d=512):
    torch.manual_seed(0)
    module = nn.Linear(d, n_classes)
    nn.init.normal_(module.weight, std=2 / d**0.5)
    return as_estimator(module, classes=range(n_classes), device=DEVICE)


def features(scale):
    rng = np.random.default_rng(0)
    X_pool = rng.normal(size=(int(30_000 * scale), 512)).astype(np.float32)
    X = rng.normal(size=(250, 512)).astype(np.float32)
    settings = {"all weights": {"sparsity": 1.0}}
    return "random features", rows_of(
        "linear head on 512 features", linear_head(), X_pool, X, 50, settings
    )


def million(scale):
    n = int(1_000_000 * scale)
    rng = np.random.default_rng(0)
    X = rng.normal(size=(250, 512)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        X_pool = np.lib.format.open_memmap(
            Path(folder) / "pool.npy", mode="w+", dtype=np.float32, shape=(n, 512)
        )
        for start in range(0, n, 50_000):
            part = X_pool[start : start + 50_000]
            part[:] = rng.normal(size=part.shape)
        X_pool.flush()
        settings = {
            "100·b candidates": {"sparsity": 1.0, "candidates": 100},
            "every sample": {"sparsity": 1.0},
        }
        return "random features", rows_of(
            "linear head on 512 features, mapped",
            linear_head(),
            X_pool,
            X,
            50,
            settings,
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
    return (
        f"| {row['pool']} | {row['setting']} | {row['forward']:.1f} | "
        f"{row['query']:.1f} | {row['query'] / row['forward']:.1f} | "
        f"{' | '.join(steps)} | {row['grown']:.1f} |"
    )


def keep(name, found):
    """Put the rows in the place of those of the same name, and write the table."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table[name] = found
    FOLDER.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    lines = [
        "# A query next to the forward pass over its pool",
        "",
        "`python benchmarks/price.py`. The check is part of the query; it stands in a "
        "column of its own as well. Memory is anonymous memory above what the process "
        "held before the query.",
        "",
        HEADER,
        *(as_line(row) for n in ROWS if n in table for row in table[n]["rows"]),
        "",
        *(f"{n}: {table[n]['machine']}  " for n in ROWS if n in table),
    ]
    (FOLDER / "price.md").write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], default=[])
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.rows or list(ROWS)
    if not args.here:
        for name in names:
            subprocess.run(
                [sys.executable, __file__, name, f"--scale={args.scale}", "--here"],
                check=True,
            )
        return
    torch.set_flush_denormal(True)
    source, rows = ROWS[names[0]](args.scale)
    print(HEADER, *map(as_line, rows), sep="\n", flush=True)
    if args.scale == 1:
        keep(names[0], {"machine": machine(source), "rows": rows})


if __name__ == "__main__":
    main()
