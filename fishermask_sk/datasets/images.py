"""Image data sets as arrays: from scikit-learn, from disk, or by torchvision's
download.

torchvision is imported only where it reads or downloads. Folders of your own are in
`image_folder`, and labelling them in `labeling`.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path, PurePosixPath
from shutil import copyfileobj
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from urllib.error import URLError

import numpy as np
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import get_data_home, load_digits
from sklearn.model_selection import train_test_split
from sklearn.utils import Bunch, check_random_state

from fishermask_sk._types import RandomState
from fishermask_sk.datasets.image_folder import ImageFolderPool
from fishermask_sk.datasets.labeling import LabelingSession

__all__ = ["ImageFolderPool", "LabelingSession", "load_images"]

_SYSTEM_HOME = Path("/usr/share/datasets")  # Debian's packages dataset-*
_ARCHIVES = (".tar", ".gz", ".xz", ".bz2", ".tgz", ".txz", ".zip")
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

# Images uint8 (n, channels, height, width) and labels int64 (n,) of "train" and of
# "test".
_Arrays = dict[str, tuple[np.ndarray, np.ndarray]]


# The path [...]/train/<class>/<file> that names an image, and its file or what that
# holds.
_Image = tuple[PurePosixPath, Path | bytes]


class _Found(NamedTuple):
    """A data set whose images are read only when it is known which."""

    classes: list[str]
    labels: dict[str, np.ndarray]  # int64 (n,) of "train" and of "test"
    images: Callable[
        [dict[str, np.ndarray]], dict[str, np.ndarray]
    ]  # from positions to uint8 images


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
        found = _from_arrays(_digits(), _DIGITS)
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


def _digits() -> _Arrays:
    """scikit-learn's digits, split once and for all; values from 0 to 16."""
    digits = load_digits()
    X, y = digits.images[:, None].astype(np.uint8), digits.target.astype(np.int64)
    train, test = train_test_split(
        np.arange(len(y)), test_size=597, stratify=y, random_state=0
    )
    return {"train": (X[train], y[train]), "test": (X[test], y[test])}


def _from_arrays(arrays: _Arrays, classes: list[str]) -> _Found:
    """A data set that is in memory."""
    return _Found(
        classes,
        {part: y for part, (_, y) in arrays.items()},
        lambda rows: {part: X[rows[part]] for part, (X, _) in arrays.items()},
    )


def _find(name: str, source: _Source, data_home: Any, download: bool) -> _Found:
    """Read a data set from the first place that has it."""
    home = Path(get_data_home() if data_home is None else data_home).expanduser()
    if home.is_file():
        return _from_images(_members(home), source, home)
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
        if _idx_file(folder, "train-images-idx3-ubyte"):
            return _from_arrays(_from_idx(folder), source.classes)
        if (folder / "train").is_dir() and (folder / "test").is_dir():
            return _from_images(_files(folder), source, folder)
        for archive in sorted(folder.glob(f"{name}*.tar*")):
            return _from_images(_members(archive), source, archive)
    folders = (
        home / source.torchvision_name / "raw",
        home / source.torchvision_name,
        home,
        *home.parents,
    )
    made = [folder for folder in folders if not folder.exists()]
    try:
        return _from_arrays(_from_torchvision(source, home, download), source.classes)
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


def _from_torchvision(source: _Source, home: Path, download: bool) -> _Arrays:
    """Read, or download first, by torchvision."""
    import torchvision

    arrays: _Arrays = {}
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


def _idx_file(folder: Path, stem: str) -> Path | None:
    """The idx file of this name, packed or not."""
    candidates = (folder / stem, folder / f"{stem}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _from_idx(folder: Path) -> _Arrays:
    """Read the four idx files of the MNIST family."""
    arrays: _Arrays = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        X = _read_idx(folder, f"{prefix}-images-idx3-ubyte", ndim=3)
        y = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", ndim=1)
        if len(X) != len(y):
            raise ValueError(
                f"{folder} has {len(X)} {part} images and {len(y)} labels; download "
                "its files again."
            )
        arrays[part] = X[:, None], y.astype(np.int64)
    return arrays


def _read_idx(folder: Path, stem: str, ndim: int) -> np.ndarray:
    """Read one idx file of uint8, packed or not, by torchvision."""
    from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

    path = _idx_file(folder, stem)
    if path is None:
        raise ValueError(
            f"{folder} has no {stem} nor {stem}.gz among its idx files; "
            "download it again."
        )
    with TemporaryDirectory() as scratch:
        unpacked = path
        if path.suffix == ".gz":
            unpacked = Path(scratch) / stem
            try:
                with gzip.open(path) as packed, unpacked.open("wb") as file:
                    copyfileobj(packed, file)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(
                    f"{path} is no complete gzip file; download it again."
                ) from error
        try:
            values = read_sn3_pascalvincent_tensor(str(unpacked)).numpy()
        # Of a file that is broken off it asserts, views or indexes what is not there.
        except (AssertionError, LookupError, RuntimeError, ValueError):
            values = np.empty(0)
    if values.ndim != ndim or values.dtype != np.uint8:
        raise ValueError(
            f"{path} is no complete idx file of {ndim} axes of uint8; download it "
            "again."
        )
    return values


# ---------------------------------------------------------------------- folders and
# archives of images


def _is_image(path: PurePosixPath) -> bool:
    """Whether a path is [...]/train/<class>/<file> or [...]/test/<class>/<file>."""
    return (
        len(path.parts) > 2
        and path.parts[-3] in ("train", "test")
        and not path.name.startswith(".")
    )


def _files(folder: Path) -> Iterator[_Image]:
    """Images below a folder."""
    for path in sorted(folder.glob("t*/*/*")):
        relative = PurePosixPath(path.relative_to(folder).as_posix())
        if path.is_file() and _is_image(relative):
            yield relative, path


class _Header(tarfile.TarInfo):
    """A member's header, which may not break off: tarfile takes that for the end of the
    archive.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        if len(buf) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("the archive breaks off in a header, or has no end")
        return super().frombuf(buf, encoding, errors)


def _members(archive: Path) -> Iterator[_Image]:
    """Images in an archive, undecoded; nothing is unpacked to disk."""
    try:
        with tarfile.open(archive, "r|*", tarinfo=_Header) as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                file = (
                    tar.extractfile(member)
                    if member.isfile() and _is_image(path)
                    else None
                )
                if file is not None:
                    yield path, file.read()
    except tarfile.TarError as error:
        raise ValueError(
            f"{archive} is no readable tar archive; pass a folder, or a whole archive."
        ) from error


def _from_images(images: Iterator[_Image], source: _Source, place: Path) -> _Found:
    """Images named [...]/train/<class>/<file> and [...]/test/<class>/<file>; classes
    sorted by name.
    """
    files: dict[str, list[_Image]] = defaultdict(list)
    for image in images:
        files[image[0].parts[-3]].append(image)
    if not files["train"] or not files["test"]:
        raise ValueError(
            f"{place} holds no images train/<class>/* and test/<class>/*; expected "
            "both."
        )
    classes = sorted({path.parts[-2] for path, _ in files["train"]})
    strangers = sorted({path.parts[-2] for path, _ in files["test"]} - set(classes))
    if strangers:
        raise ValueError(
            f"{place} has the class {strangers[0]!r} in test/ but not in train/; "
            "expected the same classes."
        )
    position = {label: column for column, label in enumerate(classes)}
    labels = {}
    for part in ("train", "test"):
        files[part].sort(
            key=lambda file: file[0].parts[-2:]
        )  # an archive has any order
        labels[part] = np.array(
            [position[path.parts[-2]] for path, _ in files[part]], dtype=np.int64
        )

    def decode(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        pixels = {
            part: [_decode(files[part][row], source, place) for row in rows[part]]
            for part in ("train", "test")
        }
        shapes = {image.shape[1:] for images in pixels.values() for image in images}
        if len(shapes) > 1:
            raise ValueError(
                f"{place} holds images of sizes {sorted(shapes)}; expected one size: "
                "resize them."
            )
        return {part: np.stack(images) for part, images in pixels.items()}

    return _Found(classes, labels, decode)


def _decode(image: _Image, source: _Source, place: Path) -> np.ndarray:
    """One image as uint8 (channels, height, width)."""
    path, content = image
    try:
        with Image.open(
            content if isinstance(content, Path) else BytesIO(content)
        ) as opened:
            pixels = np.asarray(
                opened.convert("L" if source.n_channels == 1 else "RGB")
            )
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(
            f"{path} in {place} is no readable image; remove or replace it."
        ) from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
