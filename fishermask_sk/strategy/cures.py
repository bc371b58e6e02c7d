"""Settings with which a query would fit into memory, computed, for the message that
refuses it.
"""

from __future__ import annotations

from collections.abc import Callable

from fishermask_sk.memory import Budget, Needs


def fitting_settings(
    budget: Budget,
    needs_of: Callable[[int, int, int], Needs],
    k: int,
    n_rows: int,
    n_components: int,
    exact_k: bool,
) -> str:
    """Each setting alone at its largest value that fits; where none does, a pair.

    Parameters
    ----------
    budget : Budget
    needs_of : callable (k, n_rows, n_components) -> Needs
    k, n_rows, n_components : int
        Of the query that does not fit.
    exact_k : bool
        Whether `sparsity` as an int is the mask's size.
    """

    def largest(needs_with: Callable[[int], Needs], least: int, most: int) -> int:
        """The largest value below `most`, which does not fit, that does; 0 for none."""
        if least >= most or not budget.fits(needs_with(least)):
            return 0
        while most - least > 1:
            middle = (least + most) // 2
            if budget.fits(needs_with(middle)):
                least = middle
            else:
                most = middle
        return least

    def of_weights(n: int, rows: int = n_rows) -> Needs:
        return needs_of(n, rows, min(n_components, n))

    rows = largest(lambda n: needs_of(k, n, n_components), 1, n_rows)
    components = largest(lambda n: needs_of(k, n_rows, n), 1, n_components)
    weights = largest(of_weights, 1, k) if exact_k else 0
    found = {
        "n_top_classes": rows and rows + 1,
        "n_components": components,
        "sparsity": weights,
    }
    fitting = [f"{name}={value}" for name, value in found.items() if value]
    if len(fitting) > 1:
        return f"any one of these fits: {', '.join(fitting)}"
    if fitting:
        return f"{fitting[0]} fits"
    both = largest(lambda n: of_weights(n, 1), 1, k) if exact_k and n_rows > 1 else 0
    if both:
        return f"n_top_classes=2 with sparsity={both} fits"
    return "no smaller mask fits, so propose fewer candidates"
