"""I have a folder of images
=========================

JPEG or PNG, grey or colour, of any sizes: which of them should be labelled next? Images
are read from their files when they are needed, and you can stop and go on tomorrow.
"""

# %%
# Your folder would stand here. This one is made of scikit-learn's digits: 120 files to
# choose from, and 40 like those that the model will be used on, without 0, 1 or 2.
import csv
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from fishermask_sk import FisherMask, ResNet18Classifier
from fishermask_sk.datasets import ImageFolderPool, LabelingSession

home = Path(tempfile.mkdtemp())
images, digits = load_digits(return_X_y=True)
images = np.uint8(images.reshape(-1, 8, 8) * 15)
parts = {"photos": range(120), "target": np.flatnonzero(digits > 2)[-40:]}
for part, chosen in parts.items():
    (home / part).mkdir()
    for i in chosen:
        picture = Image.fromarray(images[i]).resize((16 + i % 9, 20))
        picture.save(home / part / f"{i:04d}.{'jpg' if i % 2 else 'png'}")

# %%
# A pool, and what was answered so far
# ------------------------------------
# ``size`` is the side that the net sees; leave it out for photographs, as 224 is what
# torchvision's weights ask for. A session reads all answers in its folder. When it is
# new, a few random images are the first to be labelled.
photos = ImageFolderPool(home / "photos", size=8)
target = ImageFolderPool(home / "target", size=8)
session = LabelingSession(photos, home / "answers")
batch = session.ask(np.random.default_rng(0).choice(120, 16, replace=False))
print(*sorted(path.name for path in batch.parent.iterdir()))

# %%
# Look at ``batch-001.png`` and fill in the last column of ``batch-001.csv``, or import
# ``batch-001.tasks.json`` into Label Studio and save its export in the same folder.
# Here a few lines of code stand in for you.


def label_by_hand(batch):
    with batch.open(newline="", encoding="utf-8-sig") as file:
        header, *rows = csv.reader(file)
    with batch.open("w", newline="") as file:
        answers = [[*row[:3], f"digit {digits[int(row[1][:4])]}"] for row in rows]
        csv.writer(file).writerows([header, *answers])


label_by_hand(batch)

# %%
# Train, and ask for the images that tell most
# --------------------------------------------
# Photographs deserve pretrained weights, which are downloaded once:
# ``ResNet18Classifier(weights="DEFAULT", stem="imagenet")``. This small net starts from
# nothing. With ``X_target``, labels are chosen for what the model will be used on.
for _ in range(2):
    session = LabelingSession(photos, home / "answers")  # tomorrow begins here
    net = ResNet18Classifier(width=4, max_epochs=30, random_state=0)
    net.fit(session.labeled, session.y)
    known, pool, strategy = session.labeled, session.unlabeled, FisherMask(sparsity=400)
    picks = strategy.select(net, pool, 8, X_labeled=known, X_target=target)
    batch = session.ask(picks, guesses=net.predict(pool)[picks])
    label_by_hand(batch)
    print(f"{len(session.y)} labels of {len(session.classes)} kinds; now {batch.name}")

# %%
# The last contact sheet:
plt.figure().figimage(plt.imread(batch.with_suffix(".png")), resize=True)
# sphinx_gallery_thumbnail_path = 'images/demo-digits.png'
