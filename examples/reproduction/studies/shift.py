"""Study 14: the model will see other pictures than most of the pool, 20 seeds.

Fixed before the first run: everything here. FashionMNIST, 14×14 pixels, ten classes of
240 images. A tenth of the pool is shifted, and all of the target (40 images a class,
not in the pool) and of the test images. Dark: a quarter of the light. Blurred: a
Gaussian of standard deviation 1.2 pixels. Turned: by a quarter.

To be shown, in each of the three settings: the mean accuracy of FisherMask with target
is above that of FisherMask without. "Above": the 95 % interval of the paired difference
(BCa bootstrap over the seeds) is above zero, and p of the paired t-test, corrected by
Holm for the three settings, is below 0.05.
"""

from functools import partial

import numpy as np
from common import FOR_PURPOSE, SMALL_NET, WITH_TARGET, Setting, Study, load_shifted
from scipy.ndimage import gaussian_filter


def dark(X):
    """A quarter of the light."""
    return X / 4


def blurred(X):
    """Out of focus."""
    return gaussian_filter(X, sigma=(0, 0, 1.2, 1.2))


def turned(X):
    """By a quarter, counterclockwise."""
    return np.rot90(X, axes=(2, 3)).copy()


STUDY = Study(
    question="Which strategy prepares a model for pictures that are rare in the pool?",
    n_seeds=20,
    first_seed=100,
    settings=[
        Setting(
            name=f"a tenth {shift.__name__}",
            dataset="fashion-mnist",
            load=partial(
                load_shifted,
                name="fashion-mnist",
                pool=dict.fromkeys(range(10), 240),
                shift=shift,
                share=0.1,
                n_target=40,
                side=14,
                n_test=100,
            ),
            estimator=SMALL_NET,
            strategies=FOR_PURPOSE,
            with_target=tuple(WITH_TARGET),
            n_initial=60,
            n_instances=60,
            n_queries=3,
        )
        for shift in (dark, blurred, turned)
    ],
)
