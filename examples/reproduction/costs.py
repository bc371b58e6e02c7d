"""Record what one query costs: seconds and memory against N, C, k and b, beside the
seconds of training.

    python examples/reproduction/costs.py

The narrow ResNet-18 with its default training on 250 labels of FashionMNIST, one
thread. One size at a time moves away from N = 1,000 samples, C = 10 classes, k = 1,402
weights and b = 50 picks; once the mask is the last layer alone. No k is below 1,280,
the head's weights: a mask within the head is another case. 256 samples rank the
weights.

Writes docs/results/costs.csv, one row per size and seed; "bytes" is the memory that the
process held at most during the query, above what it held before.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts
os.environ.setdefault("MKL_NUM_THREADS", "1")

import torch

from fishermask_sk import FisherMask, ResNet18Classifier
from fishermask_sk.datasets import load_images

HERE = Path(__file__).resolve().parent
N_LABELED = 250
USUAL = {"N": 1_000, "C": 10, "k": 1_402, "b": 50}
OTHERS = {"N": (500, 2_000, 4_000), "C": (2, 4), "k": (2_000, 2_800), "b": (10, 200)}
COLUMNS = (
    "varied",
    "layers",
    "N",
    "C",
    "k",
    "b",
    "seed",
    "fit_seconds",
    "query_seconds",
    "mask_seconds",
    "embeddings_seconds",
    "selection_seconds",
    "bytes",
)


def status(field: str) -> int:
    """Bytes, as Linux counts them for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def query(
    net: Any,
    images: Any,
    varied: str,
    sizes: dict[str, int],
    seed: int,
    layers: str = "all",
) -> dict[str, Any]:
    """One query of these sizes."""
    X_labeled, X_pool = (
        images.X_train[:N_LABELED],
        images.X_train[N_LABELED:][: sizes["N"]],
    )
    strategy = FisherMask(
        sizes["k"], layers=layers, n_mask_samples=256, random_state=seed
    )
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = status("VmRSS"), time.perf_counter()
    strategy.select(net, X_pool, sizes["b"], X_labeled=X_labeled)
    spent = {"query_seconds": time.perf_counter() - start}
    spent |= {f"{step}_seconds": seconds for step, seconds in strategy.timings_.items()}
    grown = status("VmHWM") - before
    rounded = {key: round(seconds, 3) for key, seconds in spent.items()}
    return {
        "varied": varied,
        "layers": layers,
        **sizes,
        "seed": seed,
        **rounded,
        "bytes": grown,
    }


def measure(seed: int) -> Iterator[dict[str, Any]]:
    """Every size once."""
    for n_classes in (*OTHERS["C"], USUAL["C"]):
        images = load_images(
            "fashion-mnist",
            subset=dict.fromkeys(range(n_classes), 5_000 // n_classes),
            random_state=seed,
        )
        net = ResNet18Classifier(
            width=16, head_bias=False, classes=range(n_classes), random_state=seed
        )
        start = time.perf_counter()
        net.fit(images.X_train[:N_LABELED], images.y_train[:N_LABELED])
        fitted = {"fit_seconds": round(time.perf_counter() - start, 3)}
        if n_classes != USUAL["C"]:
            yield query(net, images, "C", USUAL | {"C": n_classes}, seed) | fitted
            continue
        query(
            net, images, "", USUAL | {"N": 200, "b": 5}, seed
        )  # whatever is only slow once
        yield query(net, images, "nothing", USUAL, seed) | fitted
        head = {"k": net.module_.get_parameter("fc.weight").numel()}
        yield query(net, images, "layers", USUAL | head, seed, layers="last") | fitted
        for size in ("N", "k", "b"):
            for value in OTHERS[size]:
                yield query(net, images, size, USUAL | {size: value}, seed) | fitted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE.parents[1] / "docs" / "results" / "costs.csv",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with args.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for seed in range(args.seeds):
            for row in measure(seed):
                writer.writerow(row)
                file.flush()
                print(row, flush=True)


if __name__ == "__main__":
    main()
