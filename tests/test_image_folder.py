"""A folder of images as a pool, and labelling it by CSV files and Label Studio."""

import csv
import json
import pickle
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import ResNet18_Weights

from fishermask_sk import FisherMask, ResNet18Classifier
from fishermask_sk.datasets import ImageFolderPool, LabelingSession
from fishermask_sk.datasets.label_studio import (
    label_studio_config,
    label_studio_tasks,
    read_label_studio,
)

RNG = np.random.default_rng(0)


def pixels(height, width, channels=3):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return RNG.integers(256, size=shape, dtype=np.uint8)


def save(path, array, **params):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **params)


@pytest.fixture
def folder(tmp_path):
    """Colour and grey, JPEG and PNG, of any sizes, some in subfolders."""
    root = tmp_path / "my photos"
    save(root / "b.JPG", pixels(40, 30), quality=95)
    save(root / "a.png", pixels(20, 50, 1))
    save(root / "cats" / "1.jpeg", pixels(33, 33))
    save(root / "dogs" / "old" / "2.png", pixels(9, 9, 4))
    save(root / ".hidden.png", pixels(5, 5))
    save(root / ".cache" / "x.png", pixels(5, 5))
    (root / "notes.txt").write_text("no image")
    return root


# --- the pool


def test_files_of_all_kinds_in_any_depth(folder):
    pool = ImageFolderPool(folder, size=24)
    assert pool.names == ["a.png", "b.JPG", "cats/1.jpeg", "dogs/old/2.png"]
    assert len(pool) == 4
    for image, label in pool:
        assert image.shape == (3, 24, 24)
        assert image.dtype == torch.float32
        assert label == 0
    assert pool.unreadable() == []


def test_at_224_images_are_as_the_pretrained_weights_ask(folder):
    pool = ImageFolderPool(folder)
    preset = ResNet18_Weights.DEFAULT.transforms()
    with Image.open(folder / "b.JPG") as image:
        expected = preset(image.convert("RGB"))
    assert pool[1][0].shape == (3, 224, 224)
    torch.testing.assert_close(pool[1][0], expected, rtol=0, atol=0)


def test_at_other_sizes_the_whole_shorter_side_is_seen(tmp_path):
    array = np.zeros((16, 32, 3), dtype=np.uint8)
    array[:, 8:24] = 255  # the middle square is white up to its edge
    save(tmp_path / "x.png", array)
    image, _ = ImageFolderPool(tmp_path, size=16)[0]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    white = ((1 - mean) / std)[:, None, None].expand(3, 16, 16)
    torch.testing.assert_close(image, white)


def test_a_transform_of_your_own(folder):
    pool = ImageFolderPool(folder, transform=lambda image: torch.tensor(image.size))
    assert [tuple(size) for size, _ in pool] == [(50, 20), (30, 40), (33, 33), (9, 9)]


def test_rotation_transparency_16_bits_and_palettes(tmp_path):
    array = np.zeros((4, 6, 3), dtype=np.uint8)
    array[0] = 255
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned by a quarter
    save(tmp_path / "a.png", array, exif=exif)
    save(tmp_path / "b.png", np.zeros((4, 4, 4), dtype=np.uint8))  # all transparent
    save(tmp_path / "c.png", np.full((4, 4), 128 * 256, dtype=np.uint16))
    palette = Image.fromarray(array).quantize(2)
    palette.info["transparency"] = bytes([255, 255])
    palette.save(tmp_path / "d.png")
    turned, white, grey, plain = (
        np.asarray(ImageFolderPool(tmp_path).picture(i)) for i in range(4)
    )
    assert (turned == np.rot90(array, k=-1)).all()
    assert (white == 255).all()
    assert (grey == 128).all()
    assert (plain == array).all()


def test_broken_files_are_named(folder):
    (folder / "broken.jpg").write_bytes(b"no image")
    whole = (folder / "b.JPG").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    pool = ImageFolderPool(folder, size=8)
    assert pool.unreadable() == ["broken.jpg", "cut.jpg"]
    with pytest.raises(ValueError, match=r"broken.jpg is no readable image .*; remove"):
        pool[pool.names.index("broken.jpg")]


def test_labels_by_folder(folder):
    pool = ImageFolderPool(folder)
    with pytest.raises(
        ValueError, match=r"'a.png' and 1 more lie in .* <class>/<file>"
    ):
        pool.folder_labels()
    for name in ("a.png", "b.JPG"):
        (folder / name).unlink()
    assert ImageFolderPool(folder).folder_labels().tolist() == ["cats", "dogs"]


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (
            {"folder": "nowhere"},
            FileNotFoundError,
            "There is no folder .*nowhere; pass",
        ),
        (
            {"folder": "empty"},
            ValueError,
            "holds no images; expected files that end in",
        ),
        ({"size": 0}, ValueError, "size=0 must be an int >= 1"),
        ({"size": 2.5}, ValueError, "size=2.5 must be an int >= 1"),
    ],
)
def test_wrong_folders_and_sizes(folder, tmp_path, params, error, message):
    (tmp_path / "empty").mkdir()
    place = tmp_path / params.pop("folder", folder.name)
    with pytest.raises(error, match=message):
        ImageFolderPool(place, **params)


def test_a_query_reads_the_pool_lazily_and_picks_as_from_an_array(tmp_path):
    for i in range(16):
        save(tmp_path / "pool" / f"{i:02d}.png", pixels(8 + i, 12))
    for i in range(3):
        save(tmp_path / "target" / f"{i}.jpg", pixels(20, 20))
    pool = ImageFolderPool(tmp_path / "pool", size=8)
    target = ImageFolderPool(tmp_path / "target", size=8)
    X = torch.stack([image for image, _ in pool])
    net = ResNet18Classifier(width=2, max_epochs=1, random_state=0)
    net.fit(torch.utils.data.Subset(pool, range(6)), ["cat", "dog"] * 3)
    rest = torch.utils.data.Subset(pool, range(6, 16))
    strategy = FisherMask(60, random_state=0)
    picks = strategy.select(net, rest, 3, X_labeled=X[:6], X_target=target)
    T = torch.stack([image for image, _ in target])
    assert (picks == strategy.select(net, X[6:], 3, X_labeled=X[:6], X_target=T)).all()
    again = pickle.loads(pickle.dumps(pool))
    assert (again[3][0] == X[3]).all()


# --- the session


@pytest.fixture
def images(tmp_path):
    for i in range(8):
        save(tmp_path / "photos" / f"{i}.png", pixels(10 + i, 12))
    return ImageFolderPool(tmp_path / "photos", size=8)


def fill_in(path, answers, delimiter=","):
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["label"] = answers.get(row["file"], "")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_today_and_tomorrow(images, tmp_path, delimiter):
    home = tmp_path / "answers"
    session = LabelingSession(images, home)
    assert (len(session.labeled), len(session.unlabeled)) == (0, 8)
    assert not home.exists()
    first = session.ask([5, 0, 2])
    fill_in(first, {"5.png": " cat ", "2.png": "dög", "0.png": "-"}, delimiter)

    session = LabelingSession(images, home)
    assert session.labels == {"5.png": "cat", "2.png": "dög"}
    assert session.skipped == {"0.png"}
    assert session.classes == ["cat", "dög"]
    assert session.labeled.indices == [2, 5]
    assert session.y.tolist() == ["dög", "cat"]
    assert session.unlabeled_names == ["1.png", "3.png", "4.png", "6.png", "7.png"]
    second = session.ask([4, 1], guesses=["cat", "dög"])
    assert second.name == "batch-002.csv"
    with second.open(newline="", encoding="utf-8-sig") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert rows == [("1", "7.png", "cat", ""), ("2", "3.png", "dög", "")]

    session = LabelingSession(images, home)  # an unanswered batch changes nothing
    assert len(session.labels) == 2
    text = first.read_text(encoding="utf-8")  # whoever labels thinks better of it
    first.write_text(text.replace("cat", "dög"), encoding="utf-8")
    assert LabelingSession(images, home).labels["5.png"] == "dög"


def test_the_contact_sheet_shows_the_pictures_in_order(images, tmp_path):
    for i, colour in ((6, "red"), (1, "blue")):
        Image.new("RGB", (40, 40), colour).save(images.root / f"{i}.png")
    LabelingSession(images, tmp_path / "answers").ask([6, 1], guesses=["x", "y"])
    with Image.open(tmp_path / "answers" / "batch-001.png") as sheet:
        assert sheet.getpixel((80, 80)) == (255, 0, 0)
        assert sheet.getpixel((80 + 168, 80)) == (0, 0, 255)
        text = np.asarray(sheet.convert("L"))[161:, :160]
    assert text.min() < 100


def test_a_query_of_a_session(images, tmp_path):
    session = LabelingSession(images, tmp_path / "answers")
    fill_in(session.ask([0, 1, 2, 3]), {f"{i}.png": "ab"[i % 2] for i in range(4)})
    session = LabelingSession(images, tmp_path / "answers")
    net = ResNet18Classifier(width=2, max_epochs=1, random_state=0)
    net.fit(session.labeled, session.y)
    picks = FisherMask(60).select(net, session.unlabeled, 2, X_labeled=session.labeled)
    names = [session.unlabeled_names[i] for i in picks]
    tasks = json.loads(
        session.ask(picks).with_suffix(".tasks.json").read_text(encoding="utf-8")
    )
    assert [task["data"]["file"] for task in tasks] == names
    assert set(names) <= {"4.png", "5.png", "6.png", "7.png"}


@pytest.mark.parametrize(
    ("picks", "params", "message"),
    [
        (
            [8],
            {},
            r"picks=\[8\] must be positions in unlabeled, from 0 to 7, each once",
        ),
        ([-1], {}, "must be positions in unlabeled"),
        ([1, 1], {}, "must be positions in unlabeled"),
        ([0.5], {}, "must be positions in unlabeled"),
        ([], {}, "must be positions in unlabeled"),
        ([0, 1], {"guesses": ["a"]}, "There are 1 guesses for 2 picks; pass one per"),
    ],
)
def test_wrong_picks(images, tmp_path, picks, params, message):
    with pytest.raises(ValueError, match=message):
        LabelingSession(images, tmp_path / "answers").ask(picks, **params)


def test_wrong_answers(images, tmp_path):
    home = tmp_path / "answers"
    path = LabelingSession(images, home).ask([0, 1])
    fill_in(path, {"0.png": "cat", "1.png": "dgo"})
    with pytest.raises(ValueError, match="hold 'dgo', not among classes="):
        LabelingSession(images, home, classes=["cat", "dog"])
    (home / "export.json").write_text(json.dumps([{"file": "0.png", "label": "dog"}]))
    with pytest.raises(
        ValueError, match=r"0.png is 'cat' in batch-001.csv and 'dog' in"
    ):
        LabelingSession(images, home)
    (home / "export.json").unlink()
    (images.root / "1.png").unlink()
    with pytest.warns(UserWarning, match="1 answers in .* '1.png' the first; they are"):
        session = LabelingSession(ImageFolderPool(images.root), home)
    assert session.labels == {"0.png": "cat"}
    path.write_bytes("file,label\n0.png,h\u00e4\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"is not in UTF-8 .* save it as CSV UTF-8"):
        LabelingSession(images, home)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has the columns a, b; expected file and lab"):
        LabelingSession(images, home)


def test_answers_among_the_images(images):
    for folder in (images.root, images.root / "answers"):
        with pytest.raises(ValueError, match=r"that of the images.* one outside it"):
            LabelingSession(images, folder)


# --- Label Studio, in the form of its documentation


def annotated(name, *annotations, data=None):
    """A task as an export in JSON has it."""
    data = data or {"image": f"/data/local-files/?d=photos/{name}", "file": name}
    return {
        "id": 1,
        "created_at": "2021-03-09T21:52:49.513742Z",
        "updated_at": "2021-03-09T22:16:08.746926Z",
        "project": 83,
        "data": data,
        "annotations": [
            {
                "id": 1001 + i,
                "result": [
                    {
                        "from_name": "label",
                        "id": "Dx_aB91ISN",
                        "to_name": "image",
                        "type": "choices",
                        "value": {"choices": [choice]},
                    }
                ]
                if choice
                else [],
                "was_cancelled": choice == "skip",
                "ground_truth": False,
                "created_at": "2021-03-09T22:16:08.728353Z",
                "lead_time": 4.288,
                "completed_by": 10,
            }
            for i, choice in enumerate(annotations)
        ],
        "predictions": [],
    }


def export(path, tasks):
    path.write_text(json.dumps(tasks), encoding="utf-8")
    return path


def test_an_export_is_read_back(images, tmp_path):
    home = tmp_path / "answers"
    session = LabelingSession(images, home, classes=["cat", "dög & co"])
    session.ask([3, 1, 4, 0], guesses=["cat"] * 4)
    tasks = [
        annotated("3.png", "dög & co"),
        annotated("1.png"),  # not annotated yet
        annotated("4.png", "skip"),
        annotated("0.png", "cat", "cat"),
    ]
    export(home / "project-83-at-2021-03-09.json", tasks)
    session = LabelingSession(images, home)
    assert session.labels == {"3.png": "dög & co", "0.png": "cat"}
    assert session.skipped == {"4.png"}
    assert "1.png" in session.unlabeled_names


def test_tasks_and_labelling_interface_go_together(images, tmp_path):
    home = tmp_path / "answers"
    session = LabelingSession(images, home, classes=["cat", 'a "big" <dog>'])
    session.ask([2, 6], guesses=["cat", "cat"])
    view = ET.parse(home / "label_studio.xml").getroot()
    image, choices = view
    assert image.attrib == {"name": "image", "value": "$image"}
    assert [c.attrib["value"] for c in choices] == session.classes
    tasks = json.loads((home / "batch-001.tasks.json").read_text(encoding="utf-8"))
    assert tasks[0] == {
        "data": {"image": "/data/local-files/?d=photos/2.png", "file": "2.png"},
        "predictions": [
            {
                "model_version": "guess",
                "result": [
                    {
                        "from_name": choices.attrib["name"],
                        "to_name": choices.attrib["toName"],
                        "type": "choices",
                        "value": {"choices": ["cat"]},
                    }
                ],
            }
        ],
    }
    # exported unannotated, predictions are no answers
    export(home / "export.json", [{"id": i, **t} for i, t in enumerate(tasks)])
    assert LabelingSession(images, home).labels == {}
    session.ask([2], url="http://localhost:8081/")
    tasks = json.loads((home / "batch-002.tasks.json").read_text(encoding="utf-8"))
    assert tasks == [
        {"data": {"image": "http://localhost:8081/2.png", "file": "2.png"}}
    ]


def test_json_min(tmp_path):
    rows = [
        {"image": "/x/0.png", "id": 1, "file": "0.png", "label": "cat", "annotator": 1},
        {"image": "/x/1.png", "id": 2, "file": "1.png", "label": {"choices": ["dog"]}},
        {"image": "/x/2.png", "id": 3, "file": "2.png", "annotation_id": 7},
    ]
    path = export(tmp_path / "min.json", rows)
    assert read_label_studio(path) == {"0.png": "cat", "1.png": "dog"}


@pytest.mark.parametrize(
    "address",
    [
        "/data/local-files/?d=my%20photos/cats/1%20a.jpg",
        "http://localhost:8081/cats/1%20a.jpg",
        "https://example.com/data/cats/1%20a.jpg?token=7",
        "s3://bucket/cats/1 a.jpg",
    ],
)
def test_tasks_that_label_studio_made_are_known_by_their_address(tmp_path, address):
    task = annotated(None, "cat", data={"image": address})
    path = export(tmp_path / "export.json", [task])
    names = ["1 a.jpg", "cats/1 a.jpg"]
    assert read_label_studio(path, names) == {"cats/1 a.jpg": "cat"}
    with pytest.raises(
        ValueError, match=r"is none of the pool's; import the tasks.json"
    ):
        read_label_studio(path, ["b.jpg"])


def test_annotators_who_disagree(tmp_path):
    tasks = [annotated("0.png", "cat", "dog"), annotated("1.png", "skip", "dog")]
    path = export(tmp_path / "export.json", tasks)
    with pytest.warns(UserWarning, match="1 images in .* disagree, '0.png' the first"):
        assert read_label_studio(path) == {"1.png": "dog"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON file .*; export it again"),
        ('{"id": 1}', "is no list of tasks; export as JSON or JSON-MIN"),
        ("[1]", "is no list of tasks"),
        (
            json.dumps([{"file": "0.png", "label": {"choices": ["a", "b"]}}]),
            r"holds the choice \['a', 'b'\]; expected one label an image",
        ),
    ],
)
def test_what_is_no_export(tmp_path, text, message):
    path = tmp_path / "export.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_label_studio(path)


def test_names_are_quoted_and_found_again(tmp_path):
    names = ["ä/50% + 1?.jpg", "a&b=#.png"]
    tasks = label_studio_tasks(names, url="/data/local-files/?d=photos/")
    for task in tasks:
        del task["data"]["file"]
        task["annotations"] = annotated("x", "cat")["annotations"]
    path = export(tmp_path / "export.json", tasks)
    assert read_label_studio(path, names) == dict.fromkeys(names, "cat")
    assert ET.fromstring(label_studio_config(names))[1][0].attrib["value"] == names[0]
