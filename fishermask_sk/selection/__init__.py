"""The greedy choice: what a pick lowers tr(M⁻¹F̄) by, and what candidates keep of it.

Sees tensors only. Imports nothing of the package but `distributed` and warnings.
Offers `select`, the whole of the choice; `greedy` opens with its equations, `gains` has
what a pick is worth.
"""

from fishermask_sk.selection.greedy import Selection, select

__all__ = ["Selection", "select"]
