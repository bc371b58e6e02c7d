"""What several docstrings say is written once.

In the source a docstring holds what is particular to its function. `completed_by` adds
what it shares with others when the function is made, so that help(), notebooks and the
site show all of it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
# numpydoc's sections, in its order; the summary stands in front of them.
_SECTIONS = ["", "Parameters", "Returns", "Raises", "Notes", "Attributes"]
_SECTIONS += ["References", "Examples"]


def completed_by(*shared: str | None) -> Callable[[T], T]:
    """Make a decorator that completes a numpydoc docstring from other docstrings.

    Parameters of the signature that it does not describe, and sections that it lacks,
    are taken from the first of `shared` that has them. Parameters stand in the order of
    the signature.

    Parameters
    ----------
    *shared : str
        Docstrings, of other objects or written for this. None, which docstrings are
        under ``python -OO``, has nothing to add.

    Returns
    -------
    callable
        Takes a function or class, and returns it.
    """

    def complete(documented: T) -> T:
        if documented.__doc__:
            documented.__doc__ = _completed(documented, shared)
        return documented

    return complete


def _completed(documented: object, shared: tuple[str | None, ...]) -> str:
    own = _sections(documented.__doc__ or "")
    sections, entries = dict(own), _entries(own.get("Parameters", ""))
    for doc in shared:
        found = _sections(doc or "")
        entries = {**_entries(found.get("Parameters", "")), **entries}
        if not inspect.isclass(documented):
            # Notes, sources and examples are those of the object that has them.
            for name in found.keys() & {"Returns", "Raises"}:
                sections.setdefault(name, found[name])
    names = inspect.signature(documented).parameters  # type: ignore[arg-type]
    described = dict.fromkeys(entries[name] for name in names if name in entries)
    sections["Parameters"] = "\n".join(described)
    return "\n\n".join(
        f"{name}\n{'-' * len(name)}\n{sections[name]}" if name else sections[name]
        for name in _SECTIONS
        if sections.get(name)
    )


def _sections(doc: str) -> dict[str, str]:
    """The text of each section; that of the summary under an empty name."""
    parts = re.split(r"^(\w+)\n-+$", inspect.cleandoc(doc), flags=re.MULTILINE)
    return dict(
        zip(["", *parts[1::2]], (part.strip("\n") for part in parts[::2]), strict=True)
    )


def _entries(parameters: str) -> dict[str, str]:
    """Of each parameter the lines that describe it, maybe with others."""
    entries = re.split(r"\n(?=\S)", parameters)
    return {
        name.strip(" *"): entry
        for entry in entries
        for name in entry.partition("\n")[0].partition(" : ")[0].split(",")
    }
