"""Study 10: was it luck that FisherMask had the highest mean accuracy on the text of
study 7? 30 new seeds.

Fixed before the first run: everything here. In study 7, with the seeds 0 to 9,
FisherMask's mean accuracy on the text was 1.5 points above margin sampling's (0.4 to
2.7) and 2.1 above random sampling's (0.6 to 3.5): the first lead over margin sampling
whose interval leaves out zero, in the eleventh setting; corrected for seven
comparisons, p was 0.19 and 0.14. Here is the same setting with the seeds 10 to 39. The
claim, of FisherMask alone: beside margin and beside random sampling its 95 % intervals
are above zero, and the tables' p, corrected as always, below 0.05. BAIT and the last
layer alone are there to see whether what lies below the head matters.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from common import BASELINES, Study

from fishermask_sk import FisherMask

TEXT = runpy.run_path(str(Path(__file__).with_name("networks.py")))["STUDY"].settings[1]
STRATEGIES = {name: BASELINES[name] for name in ("random", "margin", "BAIT")} | {
    "FisherMask": TEXT.strategies["FisherMask"],
    "last layer": FisherMask(layers="last"),
}

STUDY = Study(
    question="Is FisherMask ahead on the text, with new seeds?",
    n_seeds=30,
    first_seed=10,
    settings=[
        replace(TEXT, name="text, transformer, new seeds", strategies=STRATEGIES)
    ],
)
