"""Image data sets as arrays: from scikit-learn, from disk, or by torchvision's
download.

`image_files` reads what lies on disk. torchvision is imported only where it reads or
downloads. Folders of your own are in `image_folder`, and labelling them in `labeling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

import numpy as np
from sklearn.datasets import get_data_home, load_digits
from sklearn.model_selection import train_test_split
from sklearn.utils import Bunch, check_random_state

from fishermask_sk._types import RandomState
from fishermask_sk.datasets.image_files import (
    Arrays,
    Found,
    files_below,
    from_arrays,
    from_idx,
    from_images,
    idx_file,
    members,
)

_DIGITS = [str(digit) for digit in range(10)]


class _Source(NamedTuple):
    """What a data set is called and holds."""

    torchvision_name: str
    n_channels: int
    classes: list[str]


_SOURCES = {
    "fashion-mnist": _Source(
        "FashionMNIST",
        1,
        [
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ],
    ),
    "mnist": _Source("MNIST", 1, _DIGITS),
    "cifar10": _Source(
        "CIFAR10",
        3,
        [
            "airplane",
            "automobile",
            "bird",
            "cat",
            "deer",
            "dog",
            "frog",
            "horse",
            "ship",
            "truck",
        ],
    ),
    "svhn": _Source("SVHN", 3, _DIGITS),
}
_NAMES = ("digits", *_SOURCES)


def load_images(
    name: str,
    *,
    data_home: str | Path | None = None,
    subset: Mapping[Any, int] | None = None,
    random_state: RandomState = None,
    download_if_missing: bool = True,
) -> Bunch:
    """Load an image data set, whole or as an imbalanced pool.

    Parameters
    ----------
    name : {"digits", "fashion-mnist", "mnist", "cifar10", "svhn"}
        "digits" is scikit-learn's, 8×8 pixels, with 1,200 images to train on and 597 to
        test, always the same. The others are looked for in `data_home`, then in
        ``/usr/share/datasets/<name>`` (Debian's package ``dataset-fashion-mnist`` puts
        one there), and are then downloaded by torchvision.

    data_home : path-like or None, default=None
        A folder, or a .tar, .tar.gz or .tar.xz archive. Read are, in
        ``data_home/<name>``, in torchvision's folder of the same set, or in `data_home`
        itself: idx files, packed or not (``train-images-idx3-ubyte.gz``); folders of
        images ``train/<class>/*.jpg`` and ``test/<class>/*.jpg``; an archive
        ``<name>*.tar*`` of such folders; and what torchvision downloaded to
        `data_home`. None is :func:`sklearn.datasets.get_data_home`.

    subset : dict from class to count, or None, default=None
        How many training samples to keep of which class, the class by index or name.
        They are drawn without replacement and come in random order. Other classes are
        left out of the training and of the test part, and labels and `classes` count
        only those that stay: for ``{"cat": 250, "ship": 50}`` the cats have label 0. Of
        these classes the test part keeps all samples. Of image files only those that
        stay are decoded.

    random_state : int, RandomState instance or None, default=None
        Seeds the draw of `subset`; None draws a fresh seed and leaves the global
        generator as found.

    download_if_missing : bool, default=True
        Whether torchvision may download what is not found.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        ``X_train``, ``X_test`` : float32 ndarrays of shape (n_samples, channels,
        height, width), in [0, 1]; ``y_train``, ``y_test`` : int64 ndarrays of shape
        (n_samples,), from 0 to n_classes−1; ``classes`` : ndarray of shape
        (n_classes,), the name of each label.

    Raises
    ------
    ValueError
        Where the name, a class of `subset` or a count is not one that there is, or a
        file is not what it should be.
    OSError
        Where the data set is found nowhere and cannot be downloaded, or `data_home` is
        called like an archive and is no file.

    Notes
    -----
    Peak memory is the whole set once as uint8 (of image files: those that stay, and an
    archive's files as they are packed) and, besides, what is returned as float32: about
    1 GB for all of CIFAR-10.

    Examples
    --------
    >>> from fishermask_sk.datasets import load_images
    >>> digits = load_images("digits", subset={3: 100, 8: 20}, random_state=0)
    >>> digits.X_train.shape, digits.X_test.shape
    ((120, 1, 8, 8), (119, 1, 8, 8))
    >>> digits.classes[digits.y_train[:5]]
    array(['8', '3', '3', '3', '3'], dtype='<U1')
    """
    if name not in _NAMES:
        raise ValueError(
            f"name={name!r} is no known data set; pass one of "
            f"{', '.join(map(repr, _NAMES))}."
        )
    if name == "digits":
        found = from_arrays(_digits(), _DIGITS)
    else:
        found = _find(name, _SOURCES[name], data_home, download_if_missing)
    kept = list(range(len(found.classes)))
    rows = {part: np.arange(len(y)) for part, y in found.labels.items()}
    if subset is not None:
        counts = _class_counts(subset, found.classes, found.labels["train"])
        kept = sorted(counts)
        rows["train"] = _draw(found.labels["train"], counts, random_state)
        rows["test"] = np.flatnonzero(np.isin(found.labels["test"], kept))
    scale = np.float32(16 if name == "digits" else 255)
    data = Bunch(classes=np.array([found.classes[label] for label in kept]))
    for part, X in found.images(rows).items():
        data[f"X_{part}"] = X.astype(np.float32)
        data[f"X_{part}"] /= scale
        data[f"y_{part}"] = np.searchsorted(kept, found.labels[part][rows[part]])
    return data


# ---------------------------------------------------------------------- subsets


def _class_counts(subset: Any, classes: list[str], y: np.ndarray) -> dict[int, int]:
    """The counts of `subset` by label, once they are found possible."""
    if not isinstance(subset, Mapping) or not subset:
        raise ValueError(
            f"subset={subset!r} is no dict from class to count; pass for instance "
            f"{{{classes[0]!r}: 50}}."
        )
    counts: dict[int, int] = {}
    for key, count in subset.items():
        label = classes.index(key) if key in classes else key
        if (
            not isinstance(label, (int, np.integer))
            or isinstance(label, bool)
            or not 0 <= label < len(classes)
        ):
            raise ValueError(
                f"subset names the class {key!r}; pass an index from 0 to "
                f"{len(classes) - 1} or one of {', '.join(map(repr, classes))}."
            )
        if label in counts:
            raise ValueError(
                f"subset names the class {classes[label]!r} twice, by index and by "
                "name; drop one."
            )
        available = int((y == label).sum())
        if (
            not isinstance(count, (int, np.integer))
            or isinstance(count, bool)
            or not 1 <= count <= available
        ):
            raise ValueError(
                f"subset asks for {count!r} samples of class {key!r}; pass an integer "
                f"from 1 to the {available} that there are."
            )
        counts[int(label)] = int(count)
    return counts


def _draw(y: np.ndarray, counts: dict[int, int], random_state: Any) -> np.ndarray:
    """Positions of as many samples of each class as `counts` says, in random order."""
    rng = (
        np.random.RandomState()
        if random_state is None
        else check_random_state(random_state)
    )
    drawn = [
        rng.choice(np.flatnonzero(y == label), counts[label], replace=False)
        for label in sorted(counts)
    ]
    return rng.permutation(np.concatenate(drawn))


# ---------------------------------------------------------------------- sources


def _digits() -> Arrays:
    """scikit-learn's digits, split once and for all; values from 0 to 16."""
    digits = load_digits()
    X, y = digits.images[:, None].astype(np.uint8), digits.target.astype(np.int64)
    train, test = train_test_split(
        np.arange(len(y)), test_size=597, stratify=y, random_state=0
    )
    return {"train": (X[train], y[train]), "test": (X[test], y[test])}


_SYSTEM_HOME = Path("/usr/share/datasets")  # Debian's packages dataset-*
_ARCHIVES = (".tar", ".gz", ".xz", ".bz2", ".tgz", ".txz", ".zip")


def _find(name: str, source: _Source, data_home: Any, download: bool) -> Found:
    """Read a data set from the first place that has it."""
    home = Path(get_data_home() if data_home is None else data_home).expanduser()
    if home.is_file():
        return from_images(members(home), source.n_channels, home)
    if home.suffix.lower() in _ARCHIVES:  # a download would make a folder of this name
        raise FileNotFoundError(
            f"data_home={str(home)!r} is called like an archive, but is no file; pass "
            "the path of an archive that is there, or of a folder."
        )
    for folder in (
        home / name,
        home / source.torchvision_name / "raw",
        home,
        _SYSTEM_HOME / name,
    ):
        if idx_file(folder, "train-images-idx3-ubyte"):
            return from_arrays(from_idx(folder), source.classes)
        if (folder / "train").is_dir() and (folder / "test").is_dir():
            return from_images(files_below(folder), source.n_channels, folder)
        for archive in sorted(folder.glob(f"{name}*.tar*")):
            return from_images(members(archive), source.n_channels, archive)
    folders = (
        home / source.torchvision_name / "raw",
        home / source.torchvision_name,
        home,
        *home.parents,
    )
    made = [folder for folder in folders if not folder.exists()]
    try:
        return from_arrays(_from_torchvision(source, home, download), source.classes)
    except (RuntimeError, URLError, OSError) as error:
        tried = (
            "torchvision could not download it"
            if download
            else "download_if_missing is False"
        )
        raise OSError(
            f"{name!r} is neither in {home} nor in {_SYSTEM_HOME / name}, and {tried}. "
            "Put its files into data_home (or a folder or archive of images "
            "train/<class>/, test/<class>/), install the Debian package "
            f"dataset-{name} if there is one, or call load_images once with a network "
            "connection."
        ) from error
    finally:
        for folder in made:
            with suppress(
                OSError
            ):  # rmdir takes only the empty ones, which a failed download leaves
                folder.rmdir()


def _from_torchvision(source: _Source, home: Path, download: bool) -> Arrays:
    """Read, or download first, by torchvision."""
    import torchvision

    arrays: Arrays = {}
    for part in ("train", "test"):
        which = (
            {"split": part}
            if source.torchvision_name == "SVHN"
            else {"train": part == "train"}
        )
        dataset = getattr(torchvision.datasets, source.torchvision_name)(
            home, download=download, **which
        )
        X = np.asarray(dataset.data)
        if X.ndim == 3:
            X = X[:, None]
        elif source.torchvision_name == "CIFAR10":  # the one that has its channels last
            X = X.transpose(0, 3, 1, 2)
        y = dataset.labels if source.torchvision_name == "SVHN" else dataset.targets
        arrays[part] = X, np.asarray(y, dtype=np.int64)
    return arrays
