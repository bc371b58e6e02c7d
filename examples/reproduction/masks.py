"""Record where FisherMask's mask sits, query by query: weights by part of the net, and
the information they carry.

    python examples/reproduction/masks.py

Plays FisherMask with its defaults on the first settings of two studies, and writes
docs/results/masks.csv, one row per setting, seed, query and part of the net.
"share_of_mask" is the part's share of the trace of the information on the mask;
"share_of_net" is what the part's masked weights have of the trace of the whole net's.
"""

from __future__ import annotations

import argparse
import csv
import os
import runpy
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts
os.environ.setdefault("MKL_NUM_THREADS", "1")

import torch

from fishermask_sk import ActiveLearningClassifier, FisherMask
from fishermask_sk.strategy.masks import ranked_mask

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
PARTS = ("stem", "layer1", "layer2", "layer3", "layer4", "head")
COLUMNS = (
    "setting",
    "seed",
    "query",
    "n_labels",
    "part",
    "weights",
    "share_of_mask",
    "share_of_net",
)

parts_seen: list[dict[str, dict[str, float]]] = []


def recording_mask(
    scores: torch.Tensor, k: int, slices: dict[str, slice]
) -> torch.Tensor:
    """Keep the weights that FisherMask keeps by default, and note where they are."""
    every, head = [slice(0, len(scores))], [slices["fc.weight"]]
    mask_indices = ranked_mask(scores, k, every, head)
    masked = torch.zeros_like(scores).index_put_((mask_indices,), scores[mask_indices])
    kept = torch.zeros(len(scores)).index_fill_(0, mask_indices, 1)
    seen = {
        part: {"weights": 0, "share_of_mask": 0.0, "share_of_net": 0.0}
        for part in PARTS
    }
    for name, place in slices.items():
        part = seen[
            {"conv1": "stem", "bn1": "stem", "fc": "head"}.get(
                name.split(".")[0], name.split(".")[0]
            )
        ]
        part["weights"] += int(kept[place].sum())
        part["share_of_mask"] += float(masked[place].sum() / masked.sum())
        part["share_of_net"] += float(masked[place].sum() / scores.sum())
    parts_seen.append(seen)
    return mask_indices


def play(setting: Any, seed: int) -> list[dict[str, Any]]:
    """One game of FisherMask: a row for each query and part."""
    data = setting.load(seed)
    loop = ActiveLearningClassifier(
        setting.estimator,
        FisherMask(mask=recording_mask),
        n_initial=setting.n_initial,
        n_instances=setting.n_instances,
        n_queries=setting.n_queries,
        random_state=seed,
    )
    parts_seen.clear()
    loop.fit(data.X_train, data.y_train)
    name = f"{setting.dataset}, {setting.name}"
    return [
        {
            "setting": name,
            "seed": seed,
            "query": i + 1,
            "n_labels": setting.n_initial + i * setting.n_instances,
        }
        | {"part": part, **{key: round(value, 5) for key, value in of_part.items()}}
        for i, seen in enumerate(parts_seen)
        for part, of_part in seen.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", nargs="+", default=["digits", "ablations"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE.parents[1] / "docs" / "results" / "masks.csv",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rows = []
    for study in args.studies:
        setting = runpy.run_path(str(HERE / "studies" / f"{study}.py"))[
            "STUDY"
        ].settings[0]
        for seed in range(args.seeds):
            rows += play(setting, seed)
            print(f"{study}, seed {seed}", flush=True)
    with args.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
