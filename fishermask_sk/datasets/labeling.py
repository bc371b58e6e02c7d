"""Label a folder of images batch by batch: ask by contact sheet, CSV file and Label
Studio tasks, read the answers back, and go on tomorrow.

    session = LabelingSession(ImageFolderPool("photos"), "photos-labels")
    session.ask(picks)      # somebody labels; then make the session anew
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import Subset

from fishermask_sk._types import Positions
from fishermask_sk._warnings import warn_user
from fishermask_sk.datasets.image_folder import ImageFolderPool
from fishermask_sk.datasets.label_studio import (
    SKIP,
    label_studio_config,
    label_studio_tasks,
    read_label_studio,
)

# The side of a picture on the contact sheet, and the height of a line under it.
THUMBNAIL, LINE = 160, 15


class LabelingSession:
    """What is labelled in a pool and what is not, kept in a folder of answers.

    That folder is all the memory there is: for each batch ``batch-001.csv`` to fill in,
    ``batch-001.png`` to look at and ``batch-001.tasks.json`` for Label Studio, next to
    exports of Label Studio that you save there. A session reads them when it is made;
    to go on, tomorrow or after new answers, make it anew.

    Parameters
    ----------
    images : ImageFolderPool
    folder : str or Path
        For the answers; made at the first `ask`. Keep it out of the folder of images.
    classes : sequence of str, optional
        All labels, for Label Studio to offer. By default those given so far.

    Attributes
    ----------
    labels : dict of str to str
        The label of each labelled image, by name.
    skipped : set of str
        Images that were answered with "-", or skipped in Label Studio; they are in
        neither part.
    classes : list of str
    labeled, unlabeled : Subset of `images`
    y : ndarray of shape (n_labeled,)
        Labels of `labeled`.
    unlabeled_names : list of str

    Raises
    ------
    ValueError
        Where a file of answers cannot be read, an image has two labels, or the answers
        would lie among the images.

    See Also
    --------
    fishermask_sk.FisherMask.select : Picks positions in `unlabeled`.

    Notes
    -----
    Answers for images that are not in the pool are left out, with a warning. In Label
    Studio an image that was annotated several times has a label if all agree.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from fishermask_sk.datasets import ImageFolderPool, LabelingSession
    >>> home = Path(tempfile.mkdtemp())
    >>> (home / "images").mkdir()
    >>> for name in ("a.png", "b.png", "c.png"):
    ...     Image.new("RGB", (20, 20)).save(home / "images" / name)
    >>> images = ImageFolderPool(home / "images", size=16)
    >>> batch = LabelingSession(images, home / "answers").ask([2, 0])
    >>> print(batch.read_text(encoding="utf-8-sig").strip())
    number,file,guess,label
    1,c.png,,
    2,a.png,,
    >>> answers = batch.read_text().replace("c.png,,", "c.png,,cat")
    >>> _ = batch.write_text(answers)
    >>> session = LabelingSession(images, home / "answers")
    >>> session.labels, session.unlabeled_names
    ({'c.png': 'cat'}, ['a.png', 'b.png'])
    """

    def __init__(
        self,
        images: ImageFolderPool,
        folder: str | Path,
        *,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.images, self.folder = images, Path(folder).expanduser()
        place = self.folder.resolve()
        if images.root.resolve() in (place, *place.parents):
            raise ValueError(
                f"The answers' folder {self.folder} lies in that of the images, whose "
                "contact sheets would become images; name one outside it."
            )
        answers = self._answers()
        self.labels = {name: a for name, a in answers.items() if a != SKIP}
        self.skipped = set(answers) - set(self.labels)
        self.classes = (
            sorted(set(self.labels.values())) if classes is None else list(classes)
        )
        unknown = sorted(set(self.labels.values()) - set(self.classes))
        if unknown:
            raise ValueError(
                f"The answers in {self.folder} hold {unknown[0]!r}, not among classes="
                f"{self.classes}; correct the answer, or name the class."
            )
        of_labeled = [i for i, name in enumerate(images.names) if name in self.labels]
        of_rest = [i for i, name in enumerate(images.names) if name not in answers]
        self.labeled, self.unlabeled = (
            Subset(images, of_labeled),
            Subset(images, of_rest),
        )
        self.y = np.array([self.labels[images.names[i]] for i in of_labeled], dtype=str)
        self.unlabeled_names = [images.names[i] for i in of_rest]

    def ask(
        self,
        picks: Positions,
        *,
        guesses: Sequence[Any] | np.ndarray | None = None,
        url: str | None = None,
    ) -> Path:
        """Write the next batch: a CSV file to fill in, a contact sheet and Label Studio
        tasks.

        Parameters
        ----------
        picks : array-like of shape (n_instances,)
            Positions in `unlabeled`.
        guesses : array-like of shape (n_instances,), optional
            What the model takes each for; shown, and in Label Studio preselected.
        url : str, optional
            What stands before a file's name in Label Studio. By default
            ``/data/local-files/?d=<name of the images' folder>/``, for local files
            under the folder's parent.

        Returns
        -------
        Path
            Of the CSV file.

        Raises
        ------
        ValueError
            Where a pick is no position in `unlabeled`, comes twice, or `guesses` has
            another length.
        """
        picks = np.asarray(picks)
        n = len(self.unlabeled_names)
        if (
            picks.ndim != 1
            or picks.dtype.kind not in "iu"
            or not len(picks)
            or picks.min() < 0
            or picks.max() >= n
            or len(set(picks.tolist())) < len(picks)
        ):
            raise ValueError(
                f"picks={picks.tolist()!r:.60} must be positions in unlabeled, from 0 "
                f"to {n - 1}, each once."
            )
        if guesses is not None and len(guesses) != len(picks):
            raise ValueError(
                f"There are {len(guesses)} guesses for {len(picks)} picks; pass one "
                "per pick."
            )
        shown = [""] * len(picks) if guesses is None else [str(g) for g in guesses]
        names = [self.unlabeled_names[i] for i in picks]
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = self.folder / f"batch-{1 + len(self._batches()):03d}"
        self._contact_sheet(picks, names, shown).save(f"{stem}.png")
        tasks = label_studio_tasks(
            names,
            guesses=None if guesses is None else shown,
            url=f"/data/local-files/?d={quote(self.images.root.resolve().name)}/"
            if url is None
            else url,
        )
        Path(f"{stem}.tasks.json").write_text(json.dumps(tasks, indent=1), "utf-8")
        if self.classes:
            config = label_studio_config(self.classes)
            (self.folder / "label_studio.xml").write_text(config, "utf-8")
        path = Path(f"{stem}.csv")
        # Spreadsheets take a file for UTF-8 by its first bytes.
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            rows = zip(range(1, 1 + len(names)), names, shown, strict=True)
            writer = csv.writer(file)
            writer.writerow(("number", "file", "guess", "label"))
            writer.writerows((*row, "") for row in rows)
        return path

    def _batches(self) -> list[Path]:
        return sorted(self.folder.glob("batch-*.csv"))

    def _answers(self) -> dict[str, str]:
        """What every file of answers says, by name of the image."""
        given: dict[str, dict[str, str]] = defaultdict(dict)
        for path in self._batches():
            for name, label in _read_csv(path).items():
                given[name][label] = path.name
        for path in sorted(self.folder.glob("*.json")):
            for name, label in read_label_studio(path, self.images.names).items():
                given[name][label] = path.name
        for name, labels in given.items():
            if len(labels) > 1:
                (first, there), (second, here) = list(labels.items())[:2]
                raise ValueError(
                    f"{name} is {first!r} in {there} and {second!r} in {here}; correct "
                    "one of them."
                )
        strangers = set(given) - set(self.images.names)
        if strangers:
            warn_user(
                f"{len(strangers)} answers in {self.folder} are for images that are "
                f"not in {self.images.root}, {min(strangers)!r} the first; they are "
                "left out."
            )
        return {
            name: next(iter(labels))
            for name, labels in given.items()
            if name not in strangers
        }

    def _contact_sheet(
        self, picks: np.ndarray, names: list[str], guesses: list[str]
    ) -> Image.Image:
        """The images with number, name and guess, six in a row."""
        n_columns = min(6, len(picks))
        n_rows, height = -(-len(picks) // n_columns), THUMBNAIL + 3 * LINE
        sheet = Image.new(
            "RGB", (n_columns * (THUMBNAIL + 8), n_rows * height), "white"
        )
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LINE - 3)
        for at, (i, name, guess) in enumerate(zip(picks, names, guesses, strict=True)):
            left = at % n_columns * (THUMBNAIL + 8) + 4
            top = at // n_columns * height
            picture = self.images.picture(self.unlabeled.indices[i])
            whole = ImageOps.pad(picture, (THUMBNAIL, THUMBNAIL), color="lightgray")
            sheet.paste(whole, (left, top))
            lines = [f"{at + 1}", name if len(name) < 26 else f"…{name[-24:]}"]
            if guess:
                lines[0] += f"  guess: {guess}"
            draw.multiline_text(
                (left, top + THUMBNAIL + 1), "\n".join(lines), "black", font, spacing=2
            )
        return sheet


def _read_csv(path: Path) -> dict[str, str]:
    """The answers in a batch's CSV file, with commas, semicolons or tabs."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not in UTF-8 ({error}); save it as CSV UTF-8."
        ) from error
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    rows = csv.DictReader(text.splitlines(), delimiter=delimiter)
    columns = rows.fieldnames or []
    if not {"file", "label"} <= set(columns):
        raise ValueError(
            f"{path} has the columns {', '.join(columns)}; expected file and label."
        )
    answers = {row["file"]: (row["label"] or "").strip() for row in rows}
    return {name: label for name, label in answers.items() if label}
