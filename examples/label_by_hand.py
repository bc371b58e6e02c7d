"""Label a folder of images by hand
================================

Grey images, batch by batch, today and tomorrow.

.. code-block:: sh

    python examples/label_by_hand.py ask images/
    python examples/label_by_hand.py learn images/

``ask`` writes batch.csv and batch.png into the folder: fill in the column of labels,
looking at the picture. ``learn`` trains on all labels so far and saves net and labels.
Tomorrow, ``ask`` loads them and asks for the next batch.

Images are read from their files when they are needed, never all at once.
"""

import argparse
import csv
from pathlib import Path

import joblib
import numpy as np
from PIL import Image
from torch.utils.data import Dataset, Subset

from fishermask_sk import FisherMask, ResNet18Classifier
from fishermask_sk.plotting import QueryDisplay

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("action", choices=["ask", "learn"])
parser.add_argument("folder", type=Path, help="with PNG images of one size")
parser.add_argument("--n-instances", type=int, default=12, help="images per batch")
parser.add_argument(
    "--quick", action="store_true", help="a tiny net, hardly trained: does it run?"
)
args = parser.parse_args()
batch_csv, batch_png, saved = (
    args.folder / name for name in ("batch.csv", "batch.png", "saved.pkl")
)


class ImageFiles(Dataset):
    """Images read one by one; the second of each pair is where skorch looks for a
    label.
    """

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return np.asarray(Image.open(self.paths[i]).convert("L"), dtype="float32")[
            None
        ] / 255, 0


files = ImageFiles(
    sorted(path for path in args.folder.glob("*.png") if path != batch_png)
)
net, labels = (
    joblib.load(saved) if saved.exists() else (None, {})
)  # labels: file name -> label

if args.action == "learn":
    with batch_csv.open(newline="") as file:
        answers = {row["file"]: row["label"].strip() for row in csv.DictReader(file)}
    labels |= {name: label for name, label in answers.items() if label}
    if len(set(labels.values())) < 2:
        raise SystemExit(
            f"{len(labels)} labels, of fewer than two kinds; fill in more of "
            f"{batch_csv}."
        )

labeled = Subset(
    files, [i for i, path in enumerate(files.paths) if path.name in labels]
)
pool = Subset(
    files, [i for i, path in enumerate(files.paths) if path.name not in labels]
)

if args.action == "learn":
    net = ResNet18Classifier(
        width=4 if args.quick else 16, max_epochs=1 if args.quick else 200
    )
    net.fit(labeled, [labels[files.paths[i].name] for i in labeled.indices])
    joblib.dump((net, labels), saved)
    print(
        f"Learnt {len(labels)} labels of {len(net.classes_)} kinds; now ask for more."
    )
else:
    if len(pool) < args.n_instances:
        raise SystemExit(
            f"{args.folder} has {len(pool)} PNG images without a label; "
            f"{args.n_instances} are to be asked for."
        )
    if net is None:  # nothing is known yet
        picks = np.random.default_rng(0).choice(
            len(pool), args.n_instances, replace=False
        )
    else:
        strategy = FisherMask(sparsity=0.05 if args.quick else 0.002)
        picks = strategy.select(net, pool, args.n_instances, X_labeled=labeled)
    with batch_csv.open("w", newline="") as file:
        rows = [(files.paths[pool.indices[i]].name, "") for i in picks]
        csv.writer(file).writerows([("file", "label"), *rows])
    images = np.stack([pool[i][0] for i in picks])
    QueryDisplay(images, picks).plot(max_images=len(picks)).figure_.savefig(batch_png)
    print(
        f"Please label the images of {batch_png} in {batch_csv}, row by row in the "
        "same order."
    )
