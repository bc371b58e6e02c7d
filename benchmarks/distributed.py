"""One process with one thread against two with one each: seconds and bytes on the wire,
a pick and a query.

    OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 python benchmarks/distributed.py [--samples
    3000] [--weights 1402]

On a busy machine compare rank 0's seconds on its core (CPU, of a pick and of the query)
instead of those that pass. Bytes are those that went through the loopback device
meanwhile, by the kernel's count, headers and all.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import torch
import torch.distributed as dist
from skorch import NeuralNetClassifier
from torch import nn

from fishermask_sk import FisherMask

FEW, MANY = 10, 50


def loopback_bytes():
    lines = [line.split() for line in Path("/proc/net/dev").read_text().splitlines()]
    return next((int(line[1]) for line in lines if line and line[0] == "lo:"), 0)


def work(rank, size, n_samples, n_weights, folder):
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
        )
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))
    net = NeuralNetClassifier(
        module, criterion=nn.CrossEntropyLoss, verbose=0, train_split=None
    ).initialize()
    X = np.random.default_rng(0).normal(size=(n_samples, 64)).astype("float32")
    X = X[rank * n_samples // size : (rank + 1) * n_samples // size]
    strategy, found = FisherMask(n_weights, random_state=0), {}
    strategy.select(net, X[:200], 5, X_labeled=X[:0])  # whatever is only slow once
    for n_instances in (FEW, MANY):
        before, start, worked = loopback_bytes(), perf_counter(), process_time()
        strategy.select(net, X, n_instances, X_labeled=X[:0])
        found[n_instances] = {
            **strategy.timings_,
            "total": perf_counter() - start,
            "bytes": loopback_bytes() - before,
            "cpu": process_time() - worked,
        }
    if rank == 0:
        Path(folder, "found").write_text(json.dumps(found))
    if size > 1:
        dist.destroy_process_group()


def measure(size, n_samples, n_weights):
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        args = [(rank, size, n_samples, n_weights, folder) for rank in range(size)]
        processes = [context.Process(target=work, args=a) for a in args]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        found = json.loads(Path(folder, "found").read_text())
    few, many = found[str(FEW)], found[str(MANY)]
    per_pick = (many["selection"] - few["selection"]) / (MANY - FEW)
    cpu_per_pick = (many["cpu"] - few["cpu"]) / (MANY - FEW)
    bytes_per_pick = (many["bytes"] - few["bytes"]) / (MANY - FEW)
    once = few["bytes"] - FEW * bytes_per_pick
    print(
        f"{size:9}{n_samples:9,}{many['embeddings']:14.2f}{per_pick * 1000:10.1f}"
        f"{many['total']:11.2f}{cpu_per_pick * 1000:8.1f}{many['cpu']:8.2f}"
        f"{bytes_per_pick / 1000:15.1f}{once / 1e6:13.1f}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--weights", type=int, default=1402)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    print(
        f"torch {torch.__version__}, {os.cpu_count()} cores, load average {load:.1f} "
        f"before; C = 10, k = {args.weights}"
    )
    print(
        "processes  samples  embeddings s  ms a pick  query of 50  CPU ms   CPU s  kB "
        "a pick (lo)  MB once (lo)"
    )
    for size, share in ((1, 1), (2, 1), (1, 0.5), (2, 1)):  # strong scaling, then weak
        measure(size, int(args.samples * share), args.weights)
    print(f"load average {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
