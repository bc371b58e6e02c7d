"""load_images from files that the tests write; nothing is downloaded."""

import gzip
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fishermask_sk.datasets import images as datasets
from fishermask_sk.datasets import load_images

SHARED = Path(__file__).parents[2] / "shared" / "data" / "cifar10_jpeg.tar.xz"
RNG = np.random.RandomState(0)
PIXELS = {
    "train": RNG.randint(256, size=(40, 5, 4), dtype=np.uint8),
    "t10k": RNG.randint(256, size=(20, 5, 4), dtype=np.uint8),
}
LABELS = {
    "train": np.arange(40, dtype=np.uint8) % 10,
    "t10k": np.arange(20, dtype=np.uint8) % 10,
}


@pytest.fixture(autouse=True)
def no_system_data_sets(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets, "_SYSTEM_HOME", tmp_path_factory.mktemp("system"))


def write_idx(folder, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        for stem, values in (
            (f"{part}-images-idx3-ubyte", PIXELS[part]),
            (f"{part}-labels-idx1-ubyte", LABELS[part]),
        ):
            content = (
                bytes((0, 0, 8, values.ndim))
                + np.array(values.shape, ">i4").tobytes()
                + values.tobytes()
            )
            if packed:
                (folder / f"{stem}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / stem).write_bytes(content)


def write_images(folder, classes=("cat", "ship", "ant"), n=3, ending="png"):
    """A colour for each class; the file's number in the second channel."""
    for part in ("train", "test"):
        for shade, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (6, 4), (50 * shade, i, 255)).save(
                    folder / part / name / f"{i:04}.{ending}"
                )
    return folder


def pack(folder, archive):
    mode = {".xz": "w:xz", ".gz": "w:gz", ".tar": "w"}[archive.suffix]
    with tarfile.open(archive, mode) as tar:
        for path in sorted(
            folder.rglob("*"), reverse=True
        ):  # files in no helpful order
            tar.add(path, path.relative_to(folder), recursive=False)
    return archive


def check_form(data, n_channels, n_classes):
    for part in ("train", "test"):
        X, y = data[f"X_{part}"], data[f"y_{part}"]
        assert X.dtype == np.float32
        assert X.ndim == 4
        assert X.shape[1] == n_channels
        assert 0 <= X.min() <= X.max() <= 1
        assert y.dtype == np.int64
        assert y.shape == (len(X),)
        assert np.array_equal(np.unique(y), np.arange(n_classes))
    assert len(data.classes) == n_classes


# ---------------------------------------------------------------------- digits and
# subsets


def test_digits_are_split_the_same_way_every_time():
    data = load_images("digits")
    check_form(data, 1, 10)
    assert data.X_train.shape == (1200, 1, 8, 8)
    assert data.X_test.shape == (597, 1, 8, 8)
    assert data.X_train.max() == data.X_test.max() == 1
    assert np.ptp(np.bincount(data.y_test)) <= 3  # stratified
    again = load_images("digits", random_state=7)
    assert all(np.array_equal(data[key], again[key]) for key in data)


def test_subset_keeps_so_many_of_these_classes():
    whole = load_images("digits")
    data = load_images("digits", subset={8: 20, "3": 90}, random_state=0)
    check_form(data, 1, 2)
    assert list(data.classes) == ["3", "8"]
    assert np.bincount(data.y_train).tolist() == [90, 20]
    assert (
        np.bincount(data.y_test).tolist() == np.bincount(whole.y_test)[[3, 8]].tolist()
    )
    drawn = {image.tobytes() for image in data.X_train[data.y_train == 1]}
    assert len(drawn) == 20  # without replacement
    assert drawn <= {image.tobytes() for image in whole.X_train[whole.y_train == 8]}
    assert np.array_equal(
        data.X_test[data.y_test == 1], whole.X_test[whole.y_test == 8]
    )
    assert 0 < data.y_train[:20].sum() < 20  # in random order


def test_subset_is_drawn_with_random_state():
    def draw(random_state):
        return load_images(
            "digits", subset={0: 10, 1: 10}, random_state=random_state
        ).X_train

    assert np.array_equal(draw(0), draw(0))
    assert not np.array_equal(draw(0), draw(1))
    stream = np.random.RandomState(0)
    assert not np.array_equal(draw(stream), draw(stream))
    before = np.random.get_state()[1].tolist()  # noqa: NPY002 — the global generator is what is watched
    assert not np.array_equal(draw(None), draw(None))
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        (
            {"ten": 5},
            r"subset names the class 'ten'; "
            r"pass an index from 0 to 9 or one of '0', '1'",
        ),
        ({10: 5}, r"subset names the class 10; pass an index from 0 to 9"),
        ({-1: 5}, r"subset names the class -1"),
        ({True: 5}, r"subset names the class True"),
        (
            {3: 10, "3": 10},
            r"subset names the class '3' twice, by index and by name; drop one",
        ),
        (
            {3: 5000},
            r"asks for 5000 samples of class 3; "
            r"pass an integer from 1 to the 122 that there are",
        ),
        ({3: 0}, r"asks for 0 samples of class 3"),
        ({3: 2.5}, r"asks for 2.5 samples of class 3"),
        (
            [3],
            r"subset=\[3\] is no dict from class to count; "
            r"pass for instance \{'0': 50\}",
        ),
        ({}, r"subset=\{\} is no dict from class to count"),
    ],
)
def test_impossible_subsets_are_named(subset, message):
    with pytest.raises(ValueError, match=message):
        load_images("digits", subset=subset)


def test_unknown_names_list_the_known():
    with pytest.raises(
        ValueError,
        match=r"name='imagenet' is no known data set; "
        r"pass one of 'digits', 'fashion-mnist'",
    ):
        load_images("imagenet")


# ---------------------------------------------------------------------- idx files


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("place", ["fashion-mnist", "FashionMNIST/raw", "."])
def test_idx_files_in_data_home(tmp_path, place, packed):
    write_idx(tmp_path / place, packed)
    data = load_images("fashion-mnist", data_home=tmp_path, download_if_missing=False)
    check_form(data, 1, 10)
    assert np.allclose(data.X_train[:, 0] * 255, PIXELS["train"])
    assert np.allclose(data.X_test[:, 0] * 255, PIXELS["t10k"])
    assert np.array_equal(data.y_train, LABELS["train"])
    assert data.classes[9] == "Ankle boot"


def test_the_systems_files_come_after_data_home(tmp_path):
    write_idx(datasets._SYSTEM_HOME / "mnist")
    data = load_images(
        "mnist", data_home=tmp_path, subset={"7": 4}, download_if_missing=False
    )
    assert data.X_train.shape == (4, 1, 5, 4)
    write_images(tmp_path / "mnist", classes="01")
    assert load_images("mnist", data_home=tmp_path).X_train.shape == (6, 1, 4, 6)


def test_data_home_defaults_to_scikit_learns(tmp_path, monkeypatch):
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    write_idx(tmp_path / "mnist")
    assert len(load_images("mnist").X_train) == 40


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "t10k-labels-idx1-ubyte.gz").unlink(),
            r"has no t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte.gz",
        ),
        (
            lambda f: (f / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip"),
            r"gz is no complete gzip file; download it",
        ),
        (
            lambda f: (f / "t10k-images-idx3-ubyte.gz").write_bytes(
                (f / "t10k-images-idx3-ubyte.gz").read_bytes()[:-50]
            ),
            r"t10k-images-idx3-ubyte.gz is no complete gzip file",
        ),
        (
            lambda f: (f / "train-images-idx3-ubyte.gz").write_bytes(
                gzip.compress(b"\0\0\x08\x03\0\0")
            ),
            r"is no complete idx file of 3 axes of uint8; download it again",
        ),
        (
            lambda f: (f / "train-labels-idx1-ubyte.gz").write_bytes(
                (f / "t10k-labels-idx1-ubyte.gz").read_bytes()
            ),
            r"has 40 train images and 20 labels; download its files again",
        ),
    ],
)
def test_spoilt_idx_files_are_named(tmp_path, spoil, message):
    write_idx(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_images("mnist", data_home=tmp_path)


# ---------------------------------------------------------------------- folders and
# archives of images


@pytest.mark.parametrize(
    "form",
    ["folder", "named folder", ".tar", ".tar.xz", ".tar.gz", "archive in data_home"],
)
def test_class_folders(tmp_path, form):
    folder = write_images(
        tmp_path / ("cifar10" if form == "named folder" else "images")
    )
    if form == "folder":
        home = folder
    elif form == "named folder":
        home = tmp_path
    elif form == "archive in data_home":
        home = tmp_path
        pack(folder, tmp_path / "cifar10_png.tar.xz")
    else:
        home = pack(folder, tmp_path / f"archive{form}")
    data = load_images("cifar10", data_home=home, download_if_missing=False)
    check_form(data, 3, 3)
    assert list(data.classes) == ["ant", "cat", "ship"]  # sorted by name
    assert data.X_train.shape == (9, 3, 4, 6)
    assert data.y_train.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert np.allclose(
        data.X_train[:, 0, 0, 0] * 255, [100, 100, 100, 0, 0, 0, 50, 50, 50]
    )
    assert np.allclose(data.X_train[:, 1, 0, 0] * 255, [0, 1, 2] * 3)
    some = load_images(
        "cifar10", data_home=home, subset={"ship": 2, "ant": 1}, random_state=0
    )
    assert sorted(some.y_train) == [0, 1, 1]
    assert list(some.classes) == ["ant", "ship"]


def test_jpegs_become_grey_where_the_data_set_is(tmp_path):
    write_images(tmp_path, classes="01", ending="jpg")
    check_form(load_images("mnist", data_home=tmp_path), 1, 2)
    check_form(load_images("svhn", data_home=tmp_path), 3, 2)


def test_spoilt_class_folders_are_named(tmp_path):
    folder = write_images(tmp_path / "images")
    (folder / "train" / "cat" / "9999.png").write_bytes(b"no image")
    with pytest.raises(
        ValueError,
        match=r"train/cat/9999.png in .* is no readable image; remove or replace it",
    ):
        load_images("cifar10", data_home=folder)
    Image.new("RGB", (8, 8)).save(folder / "train" / "cat" / "9999.png")
    with pytest.raises(
        ValueError,
        match=r"images of sizes \[\(4, 6\), \(8, 8\)\]; expected one size: resize them",
    ):
        load_images("cifar10", data_home=folder)
    (folder / "train" / "cat" / "9999.png").unlink()
    (folder / "test" / "cat").rename(folder / "test" / "dog")
    with pytest.raises(
        ValueError, match=r"has the class 'dog' in test/ but not in train/"
    ):
        load_images("cifar10", data_home=folder)
    (folder / "test").rename(folder / "valid")
    with pytest.raises(
        ValueError,
        match=r"holds no images train/<class>/\* and test/<class>/\*; expected both",
    ):
        load_images("cifar10", data_home=pack(folder, tmp_path / "a.tar"))
    (tmp_path / "b.tar").write_bytes(b"no archive")
    with pytest.raises(
        ValueError,
        match=r"b.tar is no readable tar archive; pass a folder, or a whole archive",
    ):
        load_images("cifar10", data_home=tmp_path / "b.tar")


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_only_the_images_that_stay_are_decoded(tmp_path, form):
    folder = write_images(tmp_path / "images", n=9)
    whole = load_images(
        "cifar10", data_home=folder, subset={"ship": 4, "ant": 2}, random_state=3
    )
    for part in ("train", "test"):
        for path in (folder / part / "cat").iterdir():
            path.write_bytes(b"no image")
    kept = {
        (round(float(image[0, 0, 0] * 255)), round(float(image[1, 0, 0] * 255)))
        for image in whole.X_train
    }
    for shade, name in enumerate(("cat", "ship", "ant")):
        for i in range(9):
            if (50 * shade, i) not in kept:
                (folder / "train" / name / f"{i:04}.png").write_bytes(b"no image")
    home = folder if form == "folder" else pack(folder, tmp_path / "a.tar.xz")
    some = load_images("cifar10", data_home=home, subset={2: 4, 0: 2}, random_state=3)
    assert all(np.array_equal(whole[key], some[key]) for key in whole)
    with pytest.raises(
        ValueError,
        match=r"cat/000\d.png in .* is no readable image; remove or replace it",
    ):
        load_images("cifar10", data_home=home, subset={"cat": 1})
    with pytest.raises(
        ValueError,
        match=r"asks for 10 samples of class 'cat'; pass an integer from 1 to the 9",
    ):
        load_images("cifar10", data_home=home, subset={"cat": 10})


def test_an_archive_that_breaks_off_is_named(tmp_path):
    archive = pack(write_images(tmp_path / "images"), tmp_path / "a.tar")
    whole = archive.read_bytes()
    with tarfile.open(archive) as tar:
        last = tar.getmembers()[-1]
    for length in (
        len(whole) - 12000,
        last.offset + 100,
        last.offset,
        last.offset_data + 1,
    ):
        archive.write_bytes(whole[:length])
        with pytest.raises(
            ValueError,
            match=r"a.tar is no readable tar archive; pass a folder, or a whole",
        ):
            load_images("cifar10", data_home=archive)


# ---------------------------------------------------------------------- where nothing
# is found


@pytest.fixture
def offline(monkeypatch):
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)


@pytest.mark.parametrize("ending", [".tar.xz", ".tar", ".TGZ", ".zip"])
def test_a_mistyped_archive_is_refused_and_no_folder_made_of_it(
    tmp_path, offline, ending
):
    home = tmp_path / f"cifar10_jpge{ending}"
    message = (
        rf"data_home='.*jpge{ending}' is called like an archive, but is no file; "
        r"pass the path of an archive"
    )
    for name in ("cifar10", "mnist"):
        with pytest.raises(FileNotFoundError, match=message):
            load_images(name, data_home=home)
        assert not home.exists()
    home.mkdir()
    with pytest.raises(FileNotFoundError, match=message):
        load_images("cifar10", data_home=str(home))


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist", "cifar10", "svhn"])
def test_a_missing_data_set_names_the_three_ways(tmp_path, name):
    with pytest.raises(
        OSError,
        match=rf"'{name}' is neither in .* nor in .*{name}, "
        r"and download_if_missing is False",
    ) as info:
        load_images(name, data_home=tmp_path, download_if_missing=False)
    for way in ("into data_home", f"dataset-{name}", "with a network connection"):
        assert way in str(info.value)


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist", "cifar10", "svhn"])
def test_a_failed_download_names_the_three_ways_and_leaves_no_empty_folders(
    tmp_path, offline, name
):
    message = (
        rf"'{name}' is neither in .*, and torchvision could not download it\. "
        r"Put its files"
    )
    with pytest.raises(OSError, match=message):
        load_images(name, data_home=tmp_path / "new" / "home")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "MNIST").mkdir()
    with pytest.raises(OSError, match=message):
        load_images(name, data_home=tmp_path)
    assert [*tmp_path.rglob("*")] == [tmp_path / "MNIST"]  # what was there stays


# ---------------------------------------------------------------------- the real ones,
# where they are


def test_debians_fashion_mnist(monkeypatch, tmp_path):
    monkeypatch.undo()
    if not (datasets._SYSTEM_HOME / "fashion-mnist").is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    data = load_images(
        "fashion-mnist",
        data_home=tmp_path,
        subset={0: 250, 2: 5000, 4: 250, 6: 250},
        random_state=0,
    )
    assert data.X_train.shape == (5750, 1, 28, 28)
    assert list(data.classes) == ["T-shirt/top", "Pullover", "Coat", "Shirt"]
    assert np.bincount(data.y_test).tolist() == [1000] * 4


@pytest.mark.slow
def test_cifar10_as_an_archive_of_jpegs():
    if not SHARED.is_file():
        pytest.skip("the archive of CIFAR-10 as JPEG files is not here")
    data = load_images(
        "cifar10",
        data_home=SHARED.parent,
        subset={"cat": 250, "dog": 5000},
        random_state=0,
    )
    assert data.X_train.shape == (5250, 3, 32, 32)
    assert list(data.classes) == ["cat", "dog"]
    assert np.bincount(data.y_test).tolist() == [1000, 1000]
