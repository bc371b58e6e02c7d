"""What fits where: bytes that a query needs, that are free, and room for the rest.

Imports `selection`, whose counts these are. Offers `needs` and `Budget` (`budget`),
`free_bytes` (`free`), and bytes and seconds in words (`units`); `room` makes mapped
files. `Budget.beside` gives a batch its bytes, of which `gradients.working_memory`
makes a number of samples.
"""

from fishermask_sk.memory.budget import Budget, Needs, needs, uses_rows
from fishermask_sk.memory.free import card_of, free_bytes
from fishermask_sk.memory.units import duration, parse_memory, readable

__all__ = [
    "Budget",
    "Needs",
    "card_of",
    "duration",
    "free_bytes",
    "needs",
    "parse_memory",
    "readable",
    "uses_rows",
]
