"""Frames of a camera, for a purpose
=================================

A camera filmed for a day: most of its frames are beside the point, and everything is in
them several times. A handful of images shows where the model will run. Which frames
should be labelled?
"""

# %%
# Two folders
# -----------
# This camera filmed 100 digits, four frames each. The model will read 6, 8 and 9
# alone: a fifth of what was filmed. Thirty images of these are the target.
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import Subset

from fishermask_sk import FisherMask, ResNet18Classifier
from fishermask_sk.baselines import margin_sampling
from fishermask_sk.datasets import ImageFolderPool, LabelingSession

rng = np.random.default_rng(0)
home = Path(tempfile.mkdtemp())
images, digits = load_digits(return_X_y=True)
wanted = np.isin(digits, (6, 8, 9))
ours, others = np.flatnonzero(wanted), np.flatnonzero(~wanted)
shots = [(i, frame) for i in [*ours[:20], *others[:80]] for frame in range(4)]
for folder, chosen in {"frames": shots, "target": [(i, 0) for i in ours[-30:]]}.items():
    (home / folder).mkdir()
    for i, frame in chosen:
        picture = images[i].reshape(8, 8) * 15 + rng.normal(scale=8, size=(8, 8))
        picture = Image.fromarray(np.uint8(picture.clip(0, 255)))
        picture.resize((32, 32)).save(home / folder / f"{i:04d}-{frame}.png")

# %%
# The first labels
# ----------------
# Forty frames, drawn at random. A person would label them by contact sheet; here the
# names of the files say which digit they show.
frames = ImageFolderPool(home / "frames", size=16)
target = ImageFolderPool(home / "target", size=16)
scene = np.array([int(name[:4]) for name in frames.names])
labels = digits[scene].astype(str)
labeled = rng.choice(len(frames), 40, replace=False)
net = ResNet18Classifier(width=8, max_epochs=40, random_state=0)

# %%
# What to label next
# ------------------
# ``X_target`` is all that it takes to choose for the target. Margin sampling and
# FisherMask without it ask for what the net is unsure of, wanted or not.
net.fit(Subset(frames, labeled), labels[labeled])
rest = np.setdiff1d(np.arange(len(frames)), labeled)
pool, known = Subset(frames, rest), Subset(frames, labeled)
strategy = FisherMask(sparsity=0.005, random_state=0)
batches = {
    "margin": margin_sampling(net, pool, 20),
    "FisherMask": strategy.select(net, pool, 20, X_labeled=known),
    "with target": strategy.select(net, pool, 20, X_labeled=known, X_target=target),
}
for name, picks in batches.items():
    asked = rest[picks]
    n_wanted, n_scenes = wanted[scene[asked]].sum(), len(set(scene[asked]))
    print(f"{name}: {n_wanted} of 20 wanted, {n_scenes} different scenes")

# %%
# The batch to label
# ------------------
# As a contact sheet, a CSV file and Label Studio tasks; :doc:`folder_of_images` goes
# on from here.
session = LabelingSession(frames, home / "answers")
batch = session.ask(asked, guesses=net.predict(pool)[picks])
plt.figure().figimage(plt.imread(batch.with_suffix(".png")), resize=True)
# sphinx_gallery_thumbnail_path = 'images/embeddings.svg'
