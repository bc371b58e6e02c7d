"""Label Studio's files: tasks to import, its labelling interface, exports read back.

Formats: labelstud.io/guide/tasks ("Basic Label Studio JSON format"),
labelstud.io/guide/predictions and labelstud.io/guide/export (JSON and JSON-MIN).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import quoteattr

from fishermask_sk._warnings import warn_user

# The answer for an image that nobody can label.
SKIP = "-"


def label_studio_tasks(
    names: Iterable[str], *, guesses: Iterable[str] | None = None, url: str
) -> list[dict[str, Any]]:
    """Tasks for Label Studio to import, for the labelling interface of
    `label_studio_config`.

    Parameters
    ----------
    names : iterable of str
        File names, kept in each task's data as ``file``.
    guesses : iterable of str, optional
        One a name, imported as predictions.
    url : str
        What stands before a name: where Label Studio finds the images.

    Returns
    -------
    list of dict

    Examples
    --------
    >>> label_studio_tasks(["cat 1.jpg"], url="http://localhost:8081/")
    [{'data': {'image': 'http://localhost:8081/cat%201.jpg', 'file': 'cat 1.jpg'}}]
    """
    tasks: list[dict[str, Any]] = [
        {"data": {"image": url + quote(name), "file": name}} for name in names
    ]
    if guesses is not None:
        for task, guess in zip(tasks, guesses, strict=True):
            choice = {
                "from_name": "label",
                "to_name": "image",
                "type": "choices",
                "value": {"choices": [guess]},
            }
            task["predictions"] = [{"model_version": "guess", "result": [choice]}]
    return tasks


def label_studio_config(classes: Iterable[str]) -> str:
    """The labelling interface, one choice an image, to paste into a project's settings.

    Parameters
    ----------
    classes : iterable of str

    Returns
    -------
    str
        XML.

    Examples
    --------
    >>> print(label_studio_config(["cat", "dog"]))
    <View>
      <Image name="image" value="$image"/>
      <Choices name="label" toName="image" choice="single" showInLine="true">
        <Choice value="cat"/>
        <Choice value="dog"/>
      </Choices>
    </View>
    """
    choices = "\n".join(f"    <Choice value={quoteattr(name)}/>" for name in classes)
    return (
        '<View>\n  <Image name="image" value="$image"/>\n'
        '  <Choices name="label" toName="image" choice="single" showInLine="true">\n'
        f"{choices}\n  </Choices>\n</View>"
    )


def read_label_studio(
    path: str | Path, names: Sequence[str] | None = None
) -> dict[str, str]:
    """Read the labels out of a JSON or JSON-MIN export of Label Studio.

    Parameters
    ----------
    path : str or Path
    names : sequence of str, optional
        The images' names, for tasks that do not say theirs as ``file``: the longest
        that the image's address ends with is taken.

    Returns
    -------
    dict of str to str
        The label of each image that has one, "-" for a skipped task.

    Raises
    ------
    ValueError
        Where the file is no such export, or an image has several choices.
    """
    try:
        tasks = json.loads(Path(path).read_text("utf-8-sig"))
    except ValueError as error:
        raise ValueError(
            f"{path} is no JSON file ({error}); export it again."
        ) from error
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise ValueError(
            f"{path} is no list of tasks; export as JSON or JSON-MIN from Label Studio."
        )
    known = set(names or ())
    answers: dict[str, set[str]] = defaultdict(set)
    for task in tasks:
        chosen = _task_answers(task, path)
        if chosen:
            answers[_task_name(task.get("data", task), known, path)] |= chosen
    # Whoever skipped a task says nothing against those who did not.
    answers = {name: chosen - {SKIP} or chosen for name, chosen in answers.items()}
    disagreeing = [name for name, chosen in answers.items() if len(chosen) > 1]
    if disagreeing:
        warn_user(
            f"{len(disagreeing)} images in {path} have annotations that disagree, "
            f"{disagreeing[0]!r} the first; they count as unlabelled."
        )
    return {name: min(c) for name, c in answers.items() if len(c) == 1}


def _task_answers(task: dict[str, Any], path: str | Path) -> set[str]:
    """The labels that annotators chose in a task; none where it has no annotation."""
    if "data" in task:
        answers = set()
        for annotation in task.get("annotations") or ():
            if annotation.get("was_cancelled"):
                answers.add(SKIP)
                continue
            for result in annotation.get("result") or ():
                if result.get("type") == "choices":
                    answers.add(_only(result["value"]["choices"], path))
        return answers
    chosen = task.get("label")  # JSON-MIN: by the name of the <Choices> tag
    if chosen is None:
        return set()
    if isinstance(chosen, dict):
        chosen = chosen.get("choices")
    return {_only([chosen] if isinstance(chosen, str) else chosen, path)}


def _only(choices: Any, path: str | Path) -> str:
    if not isinstance(choices, list) or len(choices) != 1:
        raise ValueError(
            f"{path} holds the choice {choices!r}; expected one label an image: set "
            'choice="single" in the labelling interface.'
        )
    return str(choices[0])


def _task_name(data: dict[str, Any], known: set[str], path: str | Path) -> str:
    """The image's name in the pool."""
    if "file" in data:
        return str(data["file"])
    address = urlsplit(str(data.get("image", "")))
    place = parse_qs(address.query).get("d", [unquote(address.path)])[0]
    parts = place.strip("/").split("/")
    for start in range(len(parts)):
        if "/".join(parts[start:]) in known:
            return "/".join(parts[start:])
    raise ValueError(
        f"{path} has a task whose image {data.get('image')!r} is none of the pool's; "
        "import the tasks.json of a batch, which says the file's name too."
    )
