"""Draw the pages' pictures of a query anew: python docs/images.py."""

import os
import runpy
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parent

# The same file from the same numbers, whenever it is drawn.
plt.rcParams["svg.hashsalt"] = "fishermask_sk"
drawn = runpy.run_path(str(DOCS.parent / "examples" / "pictures.py"))
for name in ("rounds", "mask", "gains", "embeddings"):
    drawn[name].savefig(DOCS / "images" / f"{name}.svg", metadata={"Date": None})
