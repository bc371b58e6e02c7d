"""One query, several processes
============================

Each process holds, reads and embeds its own part of the pool.

.. code-block:: sh

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 examples/distributed.py

or, for one process, with python. The picks are the same.
"""

import os
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from skorch import NeuralNetClassifier
from torch import nn

from fishermask_sk import FisherMask
from fishermask_sk.datasets import load_images

N_LABELED, N_POOL, N_INSTANCES = 100, 600, 10


def make_net():
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    return NeuralNetClassifier(
        module,
        criterion=nn.CrossEntropyLoss,
        lr=0.1,
        max_epochs=20,
        train_split=None,
        verbose=0,
    )


def main():
    # torchrun sets RANK. On GPUs the backend is "nccl", and each rank has its device.
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    together = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    digits = load_images("digits", random_state=0)
    X_labeled, y_labeled = digits.X_train[:N_LABELED], digits.y_train[:N_LABELED]
    X_pool = digits.X_train[N_LABELED : N_LABELED + N_POOL]

    # The same net everywhere: trained from one seed here; in earnest, train once and
    # load it on every rank.
    torch.manual_seed(0)
    net = make_net().fit(X_labeled, y_labeled)

    # In earnest no rank ever sees the others' parts.
    mine = np.array_split(np.arange(N_POOL), size)[rank]
    known = np.array_split(np.arange(N_LABELED), size)[rank]
    strategy = FisherMask(500, random_state=0)
    query_idx = strategy.select(
        net, X_pool[mine], N_INSTANCES, X_labeled=X_labeled[known]
    )

    print(
        f"rank {rank} of {size} holds {len(mine)} of {N_POOL} samples; all ranks pick "
        f"{query_idx.tolist()}"
    )
    own = query_idx[np.isin(query_idx, mine)] - mine[0]
    print(f"rank {rank} is asked for {own} of its own")
    if together:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
