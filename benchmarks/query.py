"""What a query costs, each step beside the floor of its arithmetic and beside the naive
form, in one run.

    python benchmarks/query.py steps      # each step, and the whole query
    python benchmarks/query.py memory     # the selection's peak; 60,000 samples
    python benchmarks/query.py fidelity   # what fewer classes and directions keep
    python benchmarks/query.py large      # a ResNet-18 of width 64

A narrow ResNet-18 on 28×28 images, trained on 250 labels of FashionMNIST, or of random
images where it is absent. Prints tables, and writes
each to docs/benchmarks/.
"""

import argparse
import os
import platform
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from fishermask_sk import FisherMask, ResNet18Classifier
from fishermask_sk.datasets import load_images
from fishermask_sk.gradients import PerSampleGradients
from fishermask_sk.gradients.fisher import information
from fishermask_sk.gradients.modules import undisturbed
from fishermask_sk.nets.skorch_adapter import fitted_net
from fishermask_sk.selection import select
from fishermask_sk.selection.embeddings import BLOCK_NUMBERS
from fishermask_sk.strategy.query import Query
from fishermask_sk.strategy.question import Question
from fishermask_sk.strategy.ranking import find_mask

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"
N_LABELED, N_POOL, N_PICKS, N_CLASSES = 250, 5_500, 250, 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# Data, and what is measured with


def load(n_pool, n_labeled=N_LABELED):
    """Images and labels, those of a pool, and where they come from."""
    try:
        data, source = load_images("fashion-mnist"), "FashionMNIST"
        X, y = (
            np.concatenate([data.X_train, data.X_test]),
            np.concatenate([data.y_train, data.y_test]),
        )
        order = np.random.default_rng(0).permutation(len(X))
        X, y = X[order], y[order]
    except (OSError, RuntimeError):
        rng, source = np.random.default_rng(0), "random images"
        X = rng.random((n_labeled + n_pool, 1, 28, 28), dtype=np.float32)
        y = rng.integers(0, N_CLASSES, len(X))
    pool = slice(n_labeled, n_labeled + n_pool)
    return X[:n_labeled], y[:n_labeled], X[pool], y[pool], source


def train(X, y, width=16, **kwargs):
    net = ResNet18Classifier(
        width=width,
        head_bias=False,
        classes=range(N_CLASSES),
        random_state=0,
        device=DEVICE,
        **kwargs,
    )
    return net.fit(X, y)


def timed(function):
    """Seconds of one run."""
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def seconds(function, n_runs=5):
    """Median of several runs, after one that does not count."""
    timed(function)
    return median(timed(function) for _ in range(n_runs))


def alternating(*functions, n_runs=3):
    """Median seconds of each, in turn, so that a machine that changes its pace changes
    it for all of them.
    """
    for function in functions:
        timed(function)
    spent = [[timed(function) for function in functions] for _ in range(n_runs)]
    return np.median(spent, axis=0).tolist()


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def machine(source):
    name = platform.processor() or platform.machine()
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines()
        if Path("/proc/cpuinfo").exists()
        else []
    ):
        if line.startswith("model name"):
            name = line.split(":")[1].strip()
    if DEVICE == "cuda":
        name = torch.cuda.get_device_name()
    n_threads = torch.get_num_threads()
    threads = "1 thread" if n_threads == 1 else f"{n_threads} threads"
    return (
        f"{source}; {name}, {threads} of {os.cpu_count()} cores; Python "
        f"{platform.python_version()}, torch {torch.__version__}, numpy "
        f"{np.__version__}; {time.strftime('%Y-%m-%d')}."
    )


def write(section, title, source, lines):
    text = "\n".join(
        [
            f"# {title}",
            "",
            f"`python benchmarks/query.py {section}`. {machine(source)}",
            "",
            *lines,
            "",
        ]
    )
    print(text)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{section}.md").write_text(text)


class Setup:
    """A fitted net, its per-sample gradients and batches of the pool."""

    def __init__(self, n_pool=N_POOL, n_labeled=N_LABELED):
        self.X_labeled, y, self.X_pool, self.y_pool, self.source = load(
            n_pool, n_labeled
        )
        self.net = train(self.X_labeled, y)
        self.fitted = fitted_net(self.net)
        self.module = self.fitted.module.eval()
        self.gradients = PerSampleGradients(
            self.module, self.fitted.logits, self.batch(8)
        )

    def batch(self, n, start=0):
        return torch.as_tensor(self.X_pool[start : start + n]).to(DEVICE)

    def query(self, **params):
        """The steps of a query that can be timed one by one."""
        pool, n_pool = self.fitted.dataset(self.X_pool, "X_pool")
        labeled, n_labeled = self.fitted.dataset(self.X_labeled, "X_labeled")
        strategy = FisherMask(random_state=0, **params)
        settings = strategy.settings()
        return Query(
            Question(settings, self.fitted, pool, labeled, n_pool, n_labeled, N_PICKS)
        )

    def mask(self, **params):
        with undisturbed(self.module):
            query = self.query(**params)
            return find_mask(query.question, query.plan(), query.progress)

    def embedded(self, mask_indices, **params):
        with undisturbed(self.module):
            query = self.query(**params)
            plan = query.plan()._replace(gradients=self.gradients)
            embedded = query.embed(plan, mask_indices)
            every = torch.arange(embedded.pool.n, device=DEVICE)
            pool = embedded.pool.rows(every).to(embedded.pool.dtype)
            return embedded._replace(pool=pool)


# The naive forms


def masked_parameters(setup, mask_indices):
    positions, places = set(mask_indices.tolist()), setup.gradients.slices
    return [
        p
        for name, p in setup.gradients.parameters.items()
        if not positions.isdisjoint(range(places[name].start, places[name].stop))
    ]


def gradients_through_a_graph(setup, parameters, n_graph, n_timed):
    """Seconds a sample: one gradient per sample and class, through a graph of `n_graph`
    samples.
    """
    batches = [
        setup.batch(n_graph, start)
        for start in range(0, max(n_timed, n_graph), n_graph)
    ]
    wait()
    start, n_done = time.perf_counter(), 0
    for batch in batches:
        log_p = setup.fitted.logits(batch).log_softmax(1)
        for i in range(len(batch)):
            if n_done < n_timed:
                for c in range(N_CLASSES):
                    torch.autograd.grad(log_p[i, c], parameters, retain_graph=True)
                n_done += 1
    wait()
    return (time.perf_counter() - start) / n_done


def direct_pick(embeddings, n_timed=550):
    """Seconds a pick: A and B of every candidate as two batched products with k×k
    matrices that are at hand.
    """
    n, c, k = embeddings.shape
    left, right = (torch.randn(k, k, device=embeddings.device) for _ in range(2))
    v = embeddings[:n_timed]
    identity = torch.eye(c, device=v.device)

    def gains():
        a, b = v @ left @ v.mT, v @ right @ v.mT
        return torch.linalg.solve(identity + a, b).diagonal(dim1=1, dim2=2).sum(1)

    return seconds(gains, 3) * n / n_timed


def seconds_a_pick(embedded, n_labeled):
    """Mean over all picks but the first, which has to wait for the eigenvectors."""
    times = []

    def note():
        wait()
        times.append(time.perf_counter())

    select(
        embedded.pool,
        embedded.pool_information,
        N_PICKS,
        n_labeled=n_labeled,
        labeled_information=embedded.labeled_information,
        on_pick=note,
    )
    return (times[-1] - times[0]) / (N_PICKS - 1)


# Sections


def steps():
    setup = Setup()
    n, c = N_POOL, N_CLASSES
    images = setup.batch(1024)

    @torch.inference_mode()
    def forward(size):
        for part in images.split(size):
            setup.module(part)

    sizes = (64, 128, 256)
    fastest = sizes[
        np.argmin(
            alternating(*(lambda size=size: forward(size) for size in sizes), n_runs=5)
        )
    ]
    forwards = []

    def beside_forward(step):
        """Seconds a sample, of the step and of a forward pass in turn; and how many
        forward passes the check of the gradients takes, which is part of the step.
        """
        checked = []

        def noted():
            before = setup.gradients.check_seconds
            step()
            checked.append(setup.gradients.check_seconds - before)

        found, one_pass = (
            took / len(images) for took in alternating(noted, lambda: forward(fastest))
        )
        forwards.append(one_pass)
        return found, one_pass, median(checked) / len(images) / one_pass

    masks = {
        "the mask that the method picks": setup.mask(),
        "a mask spread over all layers": setup.mask(mask="per_layer", keep_head=False),
        '`layers="last"`': setup.mask(layers="last"),
    }
    rows = []

    def row(step, unit, found, floor, naive, target, check=None):
        relative = f"{found / floor:.2f} ×"
        faster = "" if naive is None else f"{naive / found:,.0f} × faster"
        passes = "" if check is None else f"{check:.2f} ×"
        rows.append(
            f"| {step} | {1e3 * found:.2f} {unit} | {1e3 * floor:.2f} | {relative} | "
            f"{target} | {passes} | {faster} |"
        )

    every = list(setup.gradients.parameters.values())
    authors_gradient = gradients_through_a_graph(setup, every, 128, 4)
    plain_gradient = gradients_through_a_graph(setup, every, 1, 24)
    plain = {}
    for name, mask_indices in masks.items():

        def embed(mask_indices=mask_indices):
            for part in images.split(128):
                setup.gradients.embeddings(part, mask_indices, reduced=True)

        found, per_forward, check = beside_forward(embed)
        plain[name] = gradients_through_a_graph(
            setup, masked_parameters(setup, mask_indices), 1, 24
        )
        floor, target = (
            (per_forward, "≤ 1.3 ×")
            if "last" in name
            else ((1 + c) * per_forward, "≤ 1.6 ×")
        )
        row(
            f"embeddings, {name}",
            "ms a sample",
            found,
            floor,
            plain[name],
            target,
            check,
        )
    fisher, per_forward, check = beside_forward(
        lambda: setup.gradients.diagonal_fisher(images.split(128))
    )
    chosen = "the mask that the method picks"
    row(
        "diagonal Fisher information, 1,024 samples",
        "ms a sample",
        fisher,
        (1 + 2 * c) * per_forward,
        plain_gradient,
        "≤ 2 ×",
        check,
    )

    embedded = setup.embedded(masks[chosen])
    k = embedded.pool.shape[2]
    whole, skinny = (
        torch.randn(n * c, k, device=DEVICE),
        torch.randn(k, 2 * c, device=DEVICE),
    )
    rows_of_all = torch.cat([embedded.pool, embedded.pool[:, :1]], dim=1)
    found = [
        (
            seconds_a_pick(embedded, N_LABELED),
            direct_pick(rows_of_all),
            seconds(partial(torch.mm, whole, skinny), 3),
        )
        for _ in range(3)
    ]
    pick, direct, product = (median(column) for column in zip(*found, strict=True))
    del whole, rows_of_all
    row(
        f"one pick, mean of {N_PICKS - 1}",
        "ms",
        pick,
        product,
        direct,
        "≤ 1.3 ×, 120 × faster",
    )
    del embedded

    strategy = FisherMask(random_state=0)
    start = time.perf_counter()
    strategy.select(setup.net, setup.X_pool, N_PICKS, X_labeled=setup.X_labeled)
    query = time.perf_counter() - start
    authors = (n + N_LABELED + 1024) * authors_gradient + N_PICKS * direct
    best_plain = (
        (n + N_LABELED) * plain[chosen] + 1024 * plain_gradient + N_PICKS * direct
    )
    took = ", ".join(
        f"{name} {spent:.1f} s" for name, spent in strategy.timings_.items()
    )
    write(
        "steps",
        "Time of a query, step by step",
        setup.source,
        [
            f"C = {c}, k = {k:,}, N = {n:,}, L = {N_LABELED}, b = {N_PICKS}, float32. "
            f"A forward pass takes {1e3 * median(forwards):.3f} ms a sample (batch "
            f"{fastest}, the fastest of 64, 128, 256). Floors: (1 + C) forward passes "
            "for embeddings, one for the last layer, (1 + 2C) for the diagonal "
            "Fisher information, and for a pick the product of the (N·C, k) "
            "embeddings with a (k, 2C) matrix. Times may be below: C − 1 rows a "
            "sample do, and one wide product serves several picks. Naive forms: "
            "gradients through graphs of one sample; a pick by two batched products "
            "with k×k matrices. The check compares gradients with autograd's on every "
            "batch; it is part of the time, and at most one forward pass is wanted. "
            "Medians of 3 runs, each in turn with its floor.",
            "",
            "| step | time | floor | against the floor | to reach | check, in forward "
            "passes | against the naive form |",
            "|---|---:|---:|---:|---:|---:|---:|",
            *rows,
            "",
            f"The whole query took {query:.1f} s ({took}). The authors' form (one "
            "gradient of all weights per sample and class through a graph of 128 "
            f"samples, {1e3 * authors_gradient:,.0f} ms a sample; direct picks, "
            f"{1e3 * direct:,.0f} ms each) would take {authors / 60:,.0f} min, "
            f"**{authors / query:,.0f} times** as long; the best plain form (graphs "
            f"of one sample, {1e3 * plain[chosen]:.1f} ms for the masked layers, "
            f"{1e3 * plain_gradient:.1f} ms for all) {best_plain / 60:,.1f} min, "
            f"**{best_plain / query:,.0f} times**. Both were timed on a part and "
            "scaled: gradients on 4 and 24 samples, picks on a tenth of the pool.",
        ],
    )


def resident(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field}")


class PeakAnonymous(threading.Thread):
    """The most anonymous memory that this process held, looked at a hundred times a
    second.
    """

    def __init__(self):
        super().__init__(daemon=True)
        self.start_bytes = self.peak = resident("RssAnon")
        self.done = threading.Event()

    def run(self):
        while not self.done.wait(0.01):
            self.peak = max(self.peak, resident("RssAnon"))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.done.set()
        self.join()
        self.grown = self.peak - self.start_bytes


def memory():
    """Each in a process of its own; where a few megabytes count, freed memory goes back
    to the system at once.
    """
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = [
        subprocess.run(
            [sys.executable, __file__, part],
            env=os.environ | environment,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout.strip()
        for part, environment in (("_peak", at_once), ("_budget", {}))
    ]
    write("memory", "Memory of a query", load(1)[-1], ["\n\n".join(found)])


def peak():
    setup = Setup()
    embedded = setup.embedded(setup.mask())
    n, rows, k = embedded.pool.shape
    pool, known = embedded.pool, embedded.labeled_information
    total = embedded.pool_information
    del embedded
    inputs = 8 * 2 * k * k
    with PeakAnonymous() as found:
        select(
            pool,
            total,
            N_PICKS,
            labeled_information=known,
            n_labeled=N_LABELED,
            overwrite=True,
        )
    block = 8 * min(BLOCK_NUMBERS["cpu"], n * rows * k)
    floor = 8 * (4 * k * k + 2 * n * N_CLASSES**2) + block
    used = found.grown + inputs
    print(
        "**Selection**, embeddings excluded, the two k×k matrices that it is given "
        f"included, float64: {used / 1e6:.0f} MB at the most, {used / floor:.2f} × of "
        f"4 k×k + 2·N·C² + one block ({floor / 1e6:.0f} MB, the block in float64 "
        f"{block / 1e6:.0f} MB); N = {n:,}, k = {k:,}, b = {N_PICKS}. To reach: ≤ 1.25 "
        "×."
    )


def budget():
    setup = Setup(60_000)
    strategy = FisherMask(max_memory="1.5GiB", random_state=0)
    with PeakAnonymous() as found:
        start = time.perf_counter()
        strategy.select(setup.net, setup.X_pool, 100, X_labeled=setup.X_labeled)
        took = time.perf_counter() - start
    size = 4 * len(setup.X_pool) * (N_CLASSES - 1) * len(strategy.mask_indices_)
    parts = ", ".join(
        f"{name} {spent:.0f} s" for name, spent in strategy.timings_.items()
    )
    print(
        f"**A pool of {len(setup.X_pool):,}**, whose embeddings take "
        f"{size / 2**30:.2f} GiB, with "
        f'`max_memory="1.5GiB"`: {found.grown / 2**30:.2f} GiB of anonymous memory '
        "above the process before the query "
        f"(to reach: ≤ 2 GiB); 100 picks in {took:.0f} s ({parts})."
    )


def matrices(embedded):
    """F̄ and the labelled samples' mean information, made here where a query does
    without them.
    """
    if embedded.pool_information is not None:
        return embedded.pool_information, embedded.labeled_information
    pool, labeled = embedded.pool, embedded.labeled
    known = labeled.information()
    total = information(pool.double()) + known
    return total / (len(pool) + labeled.n), known / labeled.n


def gain(picks, embedded):
    """tr(M⁻¹F̄) before minus after these picks, exactly, in float64."""
    n_picks = len(picks)
    weight = n_picks / (N_LABELED + n_picks)
    target, known = matrices(embedded)
    m = (1 - weight) * known
    m.diagonal().add_(1)
    after = m + weight * information(embedded.pool[picks].double())
    return float(
        torch.linalg.solve(m, target).trace()
        - torch.linalg.solve(after, target).trace()
    )


def fidelity(n_pool=2_000, n_picks=100):
    setup = Setup(n_pool)
    mask_indices = setup.mask()
    embedded = setup.embedded(mask_indices)
    rows, exact, exact_picks = [], None, set()
    cases: list[tuple[str, dict[str, Any]]] = [("exact", {})]
    cases += [(f"`n_top_classes={m}`", {"n_top_classes": m}) for m in (5, 3, 2)]
    cases += [
        (f"`n_components={r}`", {"n_components": r}) for r in (700, 350, 175, 90, 45)
    ]
    for name, params in cases:
        strategy = FisherMask(random_state=0, **params)
        picks = strategy.select(
            setup.net, setup.X_pool, n_picks, X_labeled=setup.X_labeled
        )
        share = gain(torch.as_tensor(picks), embedded)
        if exact is None:
            exact, exact_picks = share, set(picks)
        same = len(exact_picks.intersection(picks))
        spent = strategy.timings_
        rows.append(
            f"| {name} | {share / exact:.4f} | {same} of {n_picks} | "
            f"{spent['mask']:.1f} | {spent['embeddings']:.1f} | "
            f"{spent['selection']:.1f} |"
        )
    rng = np.random.default_rng(0)
    random = [
        gain(torch.as_tensor(rng.choice(n_pool, n_picks, replace=False)), embedded)
        for _ in range(5)
    ]
    rows.append(f"| random picks, mean of 5 | {np.mean(random) / exact:.4f} | | | | |")
    write(
        "fidelity",
        "What fewer classes and fewer directions cost",
        setup.source,
        [
            "Share of the exact gain, tr(M⁻¹F̄) before minus after all picks, in "
            f"float64 on the exact mask and embeddings (C = {N_CLASSES}, k = "
            f"{len(mask_indices):,}, N = {n_pool:,}, b = {n_picks}); one net, one "
            "seed.",
            "",
            "| | share of the gain kept | same picks | mask, s | embeddings, s | "
            "selection, s |",
            "|---|---:|---:|---:|---:|---:|",
            *rows,
        ],
    )


def large(n_pool=2_000, n_picks=50):
    X, y, X_pool, _, source = load(n_pool)
    # A few epochs: this is about the size of the net, not about its accuracy.
    net = train(X, y, width=64, max_epochs=2, min_steps=8)
    lines = []  # each is written when it is there
    cases: dict[str, dict[str, Any]] = {
        "exact": {},
        "`n_components=500`": {"n_components": 500},
    }
    for name, params in cases.items():
        strategy = FisherMask(random_state=0, **params)
        with PeakAnonymous() as found:
            start = time.perf_counter()
            strategy.select(net, X_pool, n_picks, X_labeled=X)
            took = time.perf_counter() - start
        parts = ", ".join(
            f"{step} {spent:.0f} s" for step, spent in strategy.timings_.items()
        )
        lines.append(
            f"| {name} | {len(strategy.mask_indices_):,} | {took / 60:.1f} min "
            f"({parts}) | {found.grown / 2**30:.1f} GiB | "
            f"{strategy.trace_reductions_.sum():.4g} |"
        )
        write(
            "large",
            "A query on a ResNet-18 of width 64",
            source,
            [
                f"11.2 million weights, sparsity 0.002, N = {n_pool:,}, L = {len(X)}, "
                f"b = {n_picks}, C = {N_CLASSES}; the net was trained for 2 epochs.",
                "",
                "| | k | time | anonymous memory above the process before | sum of "
                "its own gains |",
                "|---|---:|---|---:|---:|",
                *lines,
            ],
        )


SECTIONS = {
    "steps": steps,
    "memory": memory,
    "fidelity": fidelity,
    "large": large,
}
if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="+", choices=[*SECTIONS, "_peak", "_budget"])
    torch.set_flush_denormal(True)
    warnings.simplefilter("ignore", UserWarning)
    for section in parser.parse_args().sections:
        {**SECTIONS, "_peak": peak, "_budget": budget}[section]()
