"""Slow twins of the fast paths, written from the formulas of docs/user_guide.md, in
loops and dense inverses.

Nothing here imports the package.
"""

import numpy as np
import torch


def log_probabilities(outputs, scores, n_top_classes=None):
    """Log p(y|x) of shape (n, c), as the criterion understands the module's outputs; or
    of the m best classes alone.
    """
    if n_top_classes is not None:
        all_log_p = log_probabilities(outputs, scores)
        best = all_log_p.argsort(dim=1, descending=True)[:, :n_top_classes]
        log_p = all_log_p.gather(1, best)
        return log_p - log_p.exp().sum(1, keepdim=True).log()
    if scores == "logits":
        return outputs.log_softmax(1)
    if scores == "probabilities":
        return outputs.log()
    logit = outputs.reshape(-1)
    return torch.stack(
        [torch.nn.functional.logsigmoid(-logit), torch.nn.functional.logsigmoid(logit)],
        1,
    )


def naive_embeddings(
    module, batch, scores="logits", weighting="fisher", forward=None, n_top_classes=None
):
    """(n, c, P): row c of sample x is √p_c ∂log p_c/∂θ, one backward pass through one
    sample's graph each.

    Frozen weights get zeros.
    """
    forward = forward or module
    rows = []
    for i in range(n_samples(batch)):
        sample = one_sample(batch, i)
        log_p = log_probabilities(forward(sample), scores, n_top_classes)[0]
        sample_rows = []
        for c in range(len(log_p)):
            parameters = list(module.parameters())
            trainable = [p for p in parameters if p.requires_grad]
            p_c = log_p[c].detach().exp()
            if p_c == 0:
                grads = [None] * len(trainable)
            else:
                grads = torch.autograd.grad(
                    log_p[c], trainable, retain_graph=True, allow_unused=True
                )
            found = dict(zip(map(id, trainable), grads, strict=True))
            flat = [
                torch.zeros(p.numel(), dtype=p.dtype, device=p.device)
                if found.get(id(p)) is None
                else found[id(p)].to_dense().reshape(-1)
                for p in parameters
            ]
            weight = p_c.sqrt() if weighting == "fisher" else 1
            sample_rows.append(weight * torch.cat(flat))
        rows.append(torch.stack(sample_rows))
    return torch.stack(rows)


def n_samples(batch):
    """Length of the first tensor in a batch."""
    return len(next(iter(batch.values()))) if isinstance(batch, dict) else len(batch)


def one_sample(batch, i):
    """A batch that holds sample i alone."""
    return (
        {k: v[i : i + 1] for k, v in batch.items()}
        if isinstance(batch, dict)
        else batch[i : i + 1]
    )


def naive_diagonal_fisher(module, batch, **kwargs):
    """(P,): the mean over samples of Σ_c p_c (∂ log p_c/∂θ_j)²."""
    return naive_embeddings(module, batch, **kwargs).square().sum(1).mean(0)


def naive_top_k(scores, k):
    """The k best positions; of equal scores the lowest."""
    order = sorted(range(len(scores)), key=lambda j: (-float(scores[j]), j))
    return sorted(order[:k])


def naive_mean_information(embeddings, weights=None):
    """(k, k): Σ w VᵀV / Σ w, sample by sample."""
    weights = np.ones(len(embeddings)) if weights is None else np.asarray(weights)
    total = sum(w * v.T @ v for w, v in zip(weights, embeddings, strict=True))
    return total / weights.sum()


def naive_selection(
    pool,
    labeled,
    n_instances,
    damping=1.0,
    oversample=1.0,
    tolerance=1e-9,
    target_information=None,
):
    """Greedy minimisation of tr(M⁻¹ F̄) by dense inverses of every candidate's M, then
    the backward pass.

    Parameters
    ----------
    pool : ndarray of shape (N, c, k)
    labeled : ndarray of shape (L, c, k)
    target_information : ndarray of shape (k, k), optional
        F̄, by default the mean over pool and labelled samples.

    Returns
    -------
    picks : list of int
    gains : list of float, the trace reduction of each pick as it was made
    """
    n_pool, n_labeled, k = len(pool), len(labeled), pool.shape[2]
    everything = np.concatenate([pool, labeled])
    target = target_information
    if target is None:
        target = naive_mean_information(everything)
    m = damping * np.eye(k)
    if n_labeled:
        share = n_labeled / (n_labeled + n_instances)
        m = m + share * np.einsum("nck,ncl->kl", labeled, labeled) / n_labeled
    weight = n_instances / (n_labeled + n_instances)

    def trace(matrix):
        return np.trace(np.linalg.solve(matrix, target))

    picks, gains = [], []
    for _ in range(min(int(np.ceil(oversample * n_instances)), n_pool)):
        before = trace(m)
        gain = {
            i: before - trace(m + weight * pool[i].T @ pool[i])
            for i in range(n_pool)
            if i not in picks
        }
        best = max(gain.values())
        chosen = min(i for i in gain if gain[i] >= best - tolerance * abs(best))
        picks.append(chosen)
        gains.append(gain[chosen])
        m = m + weight * pool[chosen].T @ pool[chosen]
    while len(picks) > n_instances:
        before = trace(m)
        cost = {i: trace(m - weight * pool[i].T @ pool[i]) - before for i in picks}
        least = min(cost.values())
        dropped = min(i for i in cost if cost[i] <= least + tolerance * abs(least))
        gains.pop(picks.index(dropped))
        picks.remove(dropped)
        m = m - weight * pool[dropped].T @ pool[dropped]
    return picks, gains


def naive_facility_location(pool, target, n_instances):
    """Greedy maximisation of Σ_t max_{x∈S} s(t, x) + Σ_{x∈S} max_t s(t, x), s the
    cosine, the whole sum anew for every candidate; arXiv 2107.00717, FLQMI with η = 1.
    """
    lengths = np.outer(np.linalg.norm(pool, axis=1), np.linalg.norm(target, axis=1))
    cosine = np.divide(
        pool @ target.T, lengths, np.zeros_like(lengths), where=lengths > 0
    )

    def value(picks):
        covered = np.maximum(cosine[picks].max(axis=0, initial=0.0), 0.0)
        return covered.sum() + cosine[picks].max(axis=1).sum()

    picks, gains = [], []
    for _ in range(n_instances):
        left = [i for i in range(len(pool)) if i not in picks]
        values = {i: value([*picks, i]) - value(picks) for i in left}
        best = max(values.values())
        picks.append(min(i for i in left if values[i] >= best - 1e-9 * abs(best)))
        gains.append(best)
    return picks, gains


def naive_log_density_ratio(pool, target, n_steps=50):
    """Log of target density over pool density at the pool: the logits of a logistic
    regression (penalty |w|²/2 beside the summed loss) on standardised features, by
    Newton's method.
    """
    both = np.concatenate([pool, target])
    scale = both.std(0)
    x = (both - both.mean(0)) / np.where(scale == 0, 1, scale)
    x = np.column_stack([x, np.ones(len(x))])
    y = np.repeat([0.0, 1.0], [len(pool), len(target)])
    # Both parts count alike, and all weights together are the number of samples.
    weight = len(x) / 2 / np.where(y == 1, len(target), len(pool))
    penalty = np.diag([*np.ones(x.shape[1] - 1), 0.0])
    w = np.zeros(x.shape[1])
    for _ in range(n_steps):
        p = 1 / (1 + np.exp(-x @ w))
        gradient = x.T @ (weight * (p - y)) + penalty @ w
        hessian = (x.T * (weight * p * (1 - p))) @ x + penalty
        w = w - np.linalg.solve(hessian, gradient)
    return x[: len(pool)] @ w


def naive_power_draw(scores, n_instances, rng):
    """Draw positions one by one, each in proportion to its score among those left."""
    left, picks = list(range(len(scores))), []
    for _ in range(n_instances):
        shares = np.array([scores[i] for i in left], dtype=float)
        picks.append(left.pop(rng.choice(len(left), p=shares / shares.sum())))
    return picks


class PreciseObjective:
    """tr(M⁻¹ F̄) of any set of picks in long double, M and F̄ summed afresh: right while
    the information is less than 1e15 times λ.

    Parameters
    ----------
    pool : ndarray of shape (N, c, k)
    labeled : ndarray of shape (L, c, k)
    n_instances : int
    damping : float
    """

    def __init__(self, pool, labeled, n_instances, damping):
        pool, labeled = (v.astype(np.longdouble) for v in (pool, labeled))
        self.rows = np.concatenate([pool, labeled]).reshape(-1, pool.shape[2])
        self.n_samples = len(pool) + len(labeled)
        total = np.longdouble(len(labeled) + n_instances)
        known = labeled.reshape(-1, pool.shape[2])
        self.start = damping * np.eye(pool.shape[2], dtype=np.longdouble)
        self.start += known.T @ known / total
        self.pool = pool * np.sqrt(n_instances / total)

    def value(self, picks):
        """tr(M⁻¹ F̄) after these picks, by a Cholesky factor and substitution."""
        chosen = self.pool[list(picks)].reshape(-1, self.pool.shape[2])
        m, half = self.start + chosen.T @ chosen, self.rows.T.copy()
        for j in range(len(m)):
            column = m[j:, j] / np.sqrt(m[j, j])
            half[j] /= column[0]
            half[j + 1 :] -= np.outer(column[1:], half[j])
            m[j + 1 :, j + 1 :] -= np.outer(column[1:], column[1:])
        return float((half**2).sum() / self.n_samples)

    def gains(self, picks):
        """Of all others, by position."""
        before = self.value(picks)
        others = set(range(len(self.pool))) - set(picks)
        return {i: before - self.value([*picks, i]) for i in sorted(others)}
