"""The file of a comparison: one JSON record per line, appended as rounds end, safe
against being killed.

Knows no estimator and no strategy, only records. The first line names the run that may
append, the second holds the settings, and then come definitions of strategies and
rounds.

Only one run may hold a file: an advisory lock on ``<path>.lock``, which the system
drops with the process. A run's worker processes can outlive it when it is killed, and
would go on appending. So each run writes the file anew under a name of its own in the
first line, and a worker appends only where it finds the name it was given: what a
worker left over from a killed run has to say is refused, or ends in a file that has no
name any more.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from fishermask_sk._describe import default_of, with_names_of_today
from fishermask_sk._warnings import warn_user

Record = dict[str, Any]
Rounds = dict[tuple[str, int], list[Record]]

_VERSION = 1


class ResultsFile(NamedTuple):
    """A results file that this run holds, and the name under which it may append."""

    path: Path
    run: str

    def append(self, record: Record) -> None:
        """Add one round; it is on the disk when this returns.

        Raises
        ------
        OSError
            Where it cannot be written. What was there stays readable.
        RuntimeError
            Where a later run has taken the file over.
        """
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_APPEND)
            try:
                first_line = os.read(fd, 256).partition(b"\n")[0] + b"\n"
                if _read(first_line).get("run") != self.run:
                    raise RuntimeError(
                        f"{self.path} was taken over by a later run of "
                        "compare_strategies; this one ends."
                    )
                left = _line(record)
                # One write, so that rows of several workers do not mix; a second only
                # where the disk is full, to fail.
                while left:
                    left = left[os.write(fd, left) :]
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise _not_written(error, self.path) from error


@contextmanager
def hold(
    path: Path, settings: Record, strategies: Mapping[str, Any]
) -> Iterator[tuple[ResultsFile, Rounds]]:
    """Lock a results file, check that it belongs to these settings, and make it ready
    to go on.

    Parameters
    ----------
    path : Path
        Made where it does not exist.
    settings : dict
        What every row depends on, as JSON holds it.
    strategies : dict from name to definition
        Only these have to agree with the file. It may hold others.

    Yields
    ------
    file : ResultsFile
    rounds : dict from (strategy, seed) to list of records
        What was there: of each curve the rounds from the first on, without a gap.

    Raises
    ------
    RuntimeError
        Where another run holds the file.
    ValueError
        Where the file is no results file, or one of other settings; nothing of it is
        changed then.
    OSError
        Where it cannot be written.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"results={str(path)!r}: there is no folder {str(path.parent)!r}; make it "
            "first."
        )
    lock = FileLock(f"{path}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise RuntimeError(
            f"results={str(path)!r} is in use by another run of compare_strategies; "
            "wait for its end, or give this one a file of its own."
        ) from error
    try:
        known, definitions, rounds = read(path) if path.exists() else (None, {}, {})
        if known is not None:
            _refuse_others(path, known, settings, definitions, strategies)
        run = uuid.uuid4().hex
        definitions = {**definitions, **strategies}
        records: list[Record] = [
            {"run": run},
            {"settings": settings, "version": _VERSION},
        ]
        records += [
            {"strategy": name, "definition": definitions[name]} for name in definitions
        ]
        records += [record for curve in rounds.values() for record in curve]
        _replace(path, b"".join(map(_line, records)))
        yield ResultsFile(path, run), rounds
    finally:
        lock.release()


def read(path: Path) -> tuple[Record | None, dict[str, Any], Rounds]:
    """Read settings, definitions of strategies, and rounds; None for the settings of an
    empty file.

    A line that was cut off is passed over, and with it the later rounds of its curve:
    they are run again.

    Raises
    ------
    ValueError
        Where this is no results file.
    """
    settings: Record | None = None
    definitions: dict[str, Any] = {}
    rounds: Rounds = {}
    lines = path.read_bytes().splitlines(keepends=True)
    records = [_read(line) for line in lines]
    if records and "run" not in records[0]:
        raise ValueError(
            f"results={str(path)!r} is not a file of compare_strategies; give another "
            "path, it would be overwritten."
        )
    unreadable = [
        number for number, record in enumerate(records[:-1], start=1) if not record
    ]
    if unreadable:
        warn_user(
            f"{str(path)!r}: lines {unreadable} cannot be read and are dropped; a "
            "comparison that goes on runs their rounds again."
        )
    for record in records:
        if "settings" in record:
            settings = with_names_of_today(record["settings"])
            if record["version"] != _VERSION:
                raise ValueError(
                    f"results={str(path)!r} has version {record['version']} of the "
                    f"format, and this package reads version {_VERSION}; give another "
                    "path."
                )
        elif "definition" in record:
            definitions[record["strategy"]] = with_names_of_today(record["definition"])
        elif "round" in record:
            curve = rounds.setdefault((record["strategy"], record["seed"]), [])
            if record["round"] == len(curve):
                curve.append(record)
    return settings, definitions, rounds


def differences(known: Any, wanted: Any, path: str = "") -> list[str]:
    """Name every place where two settings differ. A parameter that an object had not in
    the file counts as its default.

    Examples
    --------
    >>> differences({"n_queries": 10, "data": "a"}, {"n_queries": 20, "data": "a"})
    ['n_queries is 10 in the file and 20 now']
    """
    if _text(known) == _text(wanted):  # 1 is not 1.0 here, and NaN is NaN
        return []
    if isinstance(known, dict) and isinstance(wanted, dict):
        found = []
        if "params" in known and known.get("class") == wanted.get("class"):
            added = [key for key in wanted["params"] if key not in known["params"]]
            then = {key: default_of(wanted["class"], key) for key in added}
            known = known | {"params": known["params"] | then}
        for key in [*known, *(key for key in wanted if key not in known)]:
            where = f"{path}.{key}" if path else str(key)
            found += differences(known.get(key), wanted.get(key), where)
        return found
    return [f"{path} is {known!r} in the file and {wanted!r} now"]


def _refuse_others(
    path: Path,
    known: Record,
    settings: Record,
    definitions: Record,
    strategies: Mapping[str, Any],
) -> None:
    found = differences(known, settings)
    for name in strategies:
        if name in definitions:
            found += differences(
                definitions[name], strategies[name], f"strategies[{name!r}]"
            )
    if found:
        raise ValueError(
            f"results={str(path)!r} belongs to other settings: {'; '.join(found[:5])}. "
            "Give another path, or the settings of the file to go on with it."
        )


def _text(settings: Any) -> str:
    return json.dumps(settings, sort_keys=True)


def _line(record: Record) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _read(line: bytes) -> Record:
    """One record; an empty one for what was cut off or is none."""
    if not line.endswith(b"\n"):
        return {}
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _replace(path: Path, data: bytes) -> None:
    """Put a whole new file in the place of the old one, or leave the old one as it
    is.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise _not_written(error, path) from error
    if os.name == "posix":  # the name, too, has to survive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _not_written(error: OSError, path: Path) -> OSError:
    return OSError(
        error.errno,
        f"Could not write to the results ({error.strerror or error}). All rounds "
        "before are safe: make room, and call compare_strategies again with the same "
        "arguments to go on",
        str(path),
    )
