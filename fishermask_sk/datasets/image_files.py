"""What files of image data sets hold: idx files of the MNIST family, and images
train/<class>/* and test/<class>/* in a folder or an archive.

torchvision is imported only where it reads.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath
from shutil import copyfileobj
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

# Images uint8 (n, channels, height, width) and labels int64 (n,) of "train" and of
# "test".
Arrays = dict[str, tuple[np.ndarray, np.ndarray]]


# The path [...]/train/<class>/<file> that names an image, and its file or what that
# holds.
NamedImage = tuple[PurePosixPath, Path | bytes]


class Found(NamedTuple):
    """A data set whose images are read only when it is known which."""

    classes: list[str]
    labels: dict[str, np.ndarray]  # int64 (n,) of "train" and of "test"
    images: Callable[
        [dict[str, np.ndarray]], dict[str, np.ndarray]
    ]  # from positions to uint8 images


def from_arrays(arrays: Arrays, classes: list[str]) -> Found:
    """A data set that is in memory."""
    return Found(
        classes,
        {part: y for part, (_, y) in arrays.items()},
        lambda rows: {part: X[rows[part]] for part, (X, _) in arrays.items()},
    )


# ---------------------------------------------------------------------- idx files


def idx_file(folder: Path, stem: str) -> Path | None:
    """The idx file of this name, packed or not."""
    candidates = (folder / stem, folder / f"{stem}.gz")
    return next((path for path in candidates if path.is_file()), None)


def from_idx(folder: Path) -> Arrays:
    """Read the four idx files of the MNIST family."""
    arrays: Arrays = {}
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

    path = idx_file(folder, stem)
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


def files_below(folder: Path) -> Iterator[NamedImage]:
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


def members(archive: Path) -> Iterator[NamedImage]:
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


def from_images(images: Iterator[NamedImage], n_channels: int, place: Path) -> Found:
    """Images named [...]/train/<class>/<file> and [...]/test/<class>/<file>; classes
    sorted by name.
    """
    files: dict[str, list[NamedImage]] = defaultdict(list)
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
            part: [_decode(files[part][row], n_channels, place) for row in rows[part]]
            for part in ("train", "test")
        }
        shapes = {image.shape[1:] for images in pixels.values() for image in images}
        if len(shapes) > 1:
            raise ValueError(
                f"{place} holds images of sizes {sorted(shapes)}; expected one size: "
                "resize them."
            )
        return {part: np.stack(images) for part, images in pixels.items()}

    return Found(classes, labels, decode)


def _decode(image: NamedImage, n_channels: int, place: Path) -> np.ndarray:
    """One image as uint8 (channels, height, width)."""
    path, content = image
    try:
        with Image.open(
            content if isinstance(content, Path) else BytesIO(content)
        ) as opened:
            pixels = np.asarray(opened.convert("L" if n_channels == 1 else "RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(
            f"{path} in {place} is no readable image; remove or replace it."
        ) from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
