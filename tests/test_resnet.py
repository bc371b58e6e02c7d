"""ResNet18Classifier through skorch's and scikit-learn's own machinery, on tiny
nets.
"""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
import tqdm.std
from sklearn.base import clone
from sklearn.metrics import f1_score, make_scorer, roc_auc_score
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skorch.callbacks import (
    BatchScoring,
    Callback,
    Checkpoint,
    EarlyStopping,
    EpochScoring,
    TrainEndCheckpoint,
)
from skorch.dataset import Dataset, ValidSplit
from skorch.exceptions import NotInitializedError
from skorch.helper import SliceDataset, predefined_split
from skorch.scoring import loss_scoring

from fishermask_sk.nets.resnet import ResNet18Classifier

RNG = np.random.RandomState(0)
Y = np.arange(24) % 3
# A bright third of the image tells the class.
X = RNG.rand(24, 1, 8, 8).astype(np.float32) * 0.3
for image, label in zip(X, Y, strict=True):
    image[0, :, 3 * label : 3 * label + 2] += 0.7


def make_net(**params):
    return ResNet18Classifier(
        **{"width": 4, "min_steps": 2, "max_epochs": 2, "random_state": 0, **params}
    )


def weights(net):
    return [
        *(p.detach().cpu().clone() for p in net.module_.parameters()),
        *(b.cpu().clone() for b in net.module_.buffers()),
    ]


def same(a, b):
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def fitted():
    return make_net(width=8, min_steps=20, max_epochs=60).fit(X, Y)


# ---------------------------------------------------------------------- the net


def test_the_papers_narrow_net_has_its_number_of_weights():
    images = np.zeros((10, 3, 2, 2), np.float32)
    net = make_net(width=16, head_bias=False, max_epochs=1).fit(images, np.arange(10))
    assert sum(p.numel() for p in net.module_.parameters()) == 701_456


@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_width_64_is_torchvisions_net(stem):
    from torchvision.models import resnet18

    net = make_net(width=64, stem=stem, max_epochs=1)
    net.fit(RNG.rand(2, 3, 8, 8), [0, 1])
    reference = resnet18(num_classes=2)
    if stem == "small":
        reference.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
        reference.maxpool = torch.nn.Identity()
    reference.load_state_dict(net.module_.state_dict())
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            net.infer(images), reference.eval()(images), rtol=0, atol=0
        )


def test_pretrained_weights_are_loaded_and_the_head_is_new(tmp_path, monkeypatch):
    from torchvision.models import ResNet18_Weights, resnet18

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    cached = (
        tmp_path
        / "hub"
        / "checkpoints"
        / ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    )
    cached.parent.mkdir(parents=True)
    pretrained = resnet18().state_dict()
    torch.save(pretrained, cached)
    images = RNG.rand(2, 3, 16, 16)
    for head_bias in (True, False):
        net = make_net(
            width=64,
            stem="imagenet",
            weights="DEFAULT",
            head_bias=head_bias,
            max_epochs=1,
            lr=0.0,
        )
        net.fit(images, ["a", "b"])
        torch.testing.assert_close(
            net.module_.layer4[1].conv2.weight.data, pretrained["layer4.1.conv2.weight"]
        )
        assert net.module_.fc.weight.shape == (2, 512)
        assert (net.module_.fc.bias is not None) == head_bias


def test_it_learns_and_stops_by_its_rule(fitted):
    assert fitted.score(X, Y) == 1.0
    assert fitted.history[-1, "train_acc"] >= 0.99
    assert 20 <= fitted.n_steps_ < 60
    assert len(make_net(stop_accuracy=None, max_epochs=4).fit(X, Y).history) == 4
    assert make_net(min_steps=50, max_epochs=3).fit(X, Y).n_steps_ == 3


def test_batchnorm_statistics_are_those_of_the_final_weights():
    net = make_net(batch_size=-1).fit(X, Y)
    layer, seen = net.module_.bn1, []
    handle = net.module_.conv1.register_forward_hook(
        lambda module, args, output: seen.append(output.detach())
    )
    net.predict_proba(X)
    handle.remove()
    torch.testing.assert_close(layer.running_mean, seen[0].mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, seen[0].var((0, 2, 3)))
    assert layer.momentum == 0.1
    assert not any(module.training for module in net.module_.modules())


def test_one_epoch_trains_on_equal_batches_and_never_on_one_sample():
    sizes = []

    class Watched(ResNet18Classifier):
        def train_step_single(self, batch, **fit_params):
            sizes.append(len(batch[0]))
            return super().train_step_single(batch, **fit_params)

    for n, batch_size, expected in [
        (17, 16, [9, 8]),
        (24, 24, [24]),
        (3, 2, [2]),
        (7, 3, [3, 3]),
        (24, -1, [24]),
    ]:
        sizes.clear()
        Watched(width=4, batch_size=batch_size, max_epochs=1).fit(X[:n], Y[:n])
        assert sizes == expected


# ---------------------------------------------------------------------- images and
# labels


@pytest.mark.parametrize(
    "labels",
    [
        Y.astype(np.int32),
        Y.astype(np.uint8),
        Y * 10 - 7,
        np.array(["cat", "dog", "ship"])[Y],
        np.array(["cat", "dog", "ship"], dtype=object)[Y],
        (Y > 0),
        Y.astype(float),
        Y.tolist(),
        torch.tensor(Y),
    ],
    ids=[
        "int32",
        "uint8",
        "gaps",
        "strings",
        "objects",
        "bool",
        "float",
        "list",
        "tensor",
    ],
)
def test_labels_of_any_kind(labels):
    net = make_net(width=8, min_steps=15, max_epochs=60).fit(X, labels)
    as_array = np.asarray(labels)
    assert np.array_equal(net.classes_, np.unique(as_array))
    assert net.predict_proba(X).shape == (24, len(net.classes_))
    assert np.array_equal(net.predict(X), net.classes_[net.predict_proba(X).argmax(1)])
    assert np.array_equal(net.predict(X), as_array)
    assert net.score(X, labels) == 1.0


def test_classes_name_what_the_first_batch_misses():
    some = Y != 1
    net = make_net(width=8, min_steps=15, max_epochs=60, classes=["c", "b", "a"])
    assert list(net.classes_) == ["a", "b", "c"]
    net.fit(X[some], np.array(["a", "b", "c"])[Y[some]])
    assert list(net.classes_) == ["a", "b", "c"]
    assert net.predict_proba(X).shape == (24, 3)
    assert set(net.predict(X[some])) == {"a", "c"}
    one = make_net(classes=[0, 5]).fit(X[:4], [5, 5, 5, 5])
    assert one.predict_proba(X).shape == (24, 2)


def test_image_formats_agree(fitted):
    expected = fitted.predict_proba(X)
    for images in (
        X.astype(np.float64),
        X[:, 0],
        torch.tensor(X),
        torch.tensor(X[:, 0]).double(),
        np.flip(X, -1).copy()[..., ::-1],  # negative strides
        X.astype(">f4"),
        list(X),
        SliceDataset(Dataset(X, Y)),
        Dataset(X, Y),
    ):
        assert np.allclose(fitted.predict_proba(images), expected, atol=1e-6)


def test_uint8_is_scaled_to_the_unit_interval(fitted):
    pixels = np.round(X.clip(0, 1) * 255).astype(np.uint8)
    assert np.allclose(
        fitted.predict_proba(pixels),
        fitted.predict_proba(pixels.astype(np.float32) / 255),
        atol=1e-6,
    )
    assert same(
        weights(make_net().fit(pixels, Y)),
        weights(make_net().fit(pixels.astype(np.float32) / 255, Y)),
    )


@pytest.mark.parametrize(
    "images", [X, (X[:, 0] * 255).astype(np.uint8), torch.tensor(X)]
)
def test_skorchs_batches_give_what_predict_proba_computes(fitted, images):
    logits = []
    with torch.no_grad():
        for batch, _ in fitted.get_iterator(fitted.get_dataset(images), training=False):
            logits.append(fitted.infer(batch))
    assert np.array_equal(
        torch.cat(logits).softmax(1).numpy(), fitted.predict_proba(images)
    )
    assert isinstance(fitted.criterion_, torch.nn.CrossEntropyLoss)


def test_training_mode_forward_keeps_all_samples_in_order(fitted):
    net = copy.deepcopy(fitted).set_params(batch_size=23)
    sizes = [
        len(batch) for batch, _ in net.get_iterator(net.get_dataset(X), training=True)
    ]
    assert sizes == [23, 1]


def test_datasets_with_labels():
    pairs = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y * 2))
    reference = make_net().fit(X, Y * 2)
    for data, labels in [
        (pairs, None),
        (Dataset(X, Y * 2), None),
        (pairs, Y * 2),
        (SliceDataset(pairs), Y * 2),
    ]:
        net = make_net().fit(data, labels)
        assert list(net.classes_) == [0, 2, 4]
        assert same(weights(net), weights(reference))
        assert np.array_equal(net.predict(pairs), reference.predict(X))


def test_infer_follows_the_modules_dtype(fitted):
    net = copy.deepcopy(fitted)
    net.module_.double()
    assert net.infer(torch.tensor(X)).dtype == torch.float64


# ---------------------------------------------------------------------- randomness


def test_same_random_state_same_weights():
    first, again, other = (
        make_net(random_state=seed, batch_size=8, crop_and_flip=True).fit(X, Y)
        for seed in (3, 3, 4)
    )
    assert same(weights(first), weights(again))
    assert same(weights(first), weights(again.fit(X, Y)))  # a refit starts anew
    assert not same(weights(first), weights(other))
    stream = make_net(random_state=np.random.RandomState(0))
    assert not same(weights(stream.fit(X, Y)), weights(stream.fit(X, Y)))
    assert not same(
        weights(make_net(random_state=None).fit(X, Y)),
        weights(make_net(random_state=None).fit(X, Y)),
    )


@pytest.mark.parametrize("random_state", [None, 0])
def test_global_state_is_left_as_found(random_state):
    def state():
        cudnn = torch.backends.cudnn
        numpy_state = np.random.get_state()  # noqa: NPY002 — the global generator is what is watched
        return (
            torch.get_rng_state().tolist(),
            numpy_state[1].tolist(),
            cudnn.deterministic,
            cudnn.benchmark,
        )

    net = make_net(random_state=random_state, batch_size=8, crop_and_flip=True)
    before = state()
    net.fit(X, Y).partial_fit(X, Y)
    net.predict_proba(X)
    assert state() == before
    with pytest.raises(TypeError):
        net.fit(X, Y, unknown_to_the_module=1)
    assert state() == before


@pytest.mark.parametrize("flush", [True, False])
def test_denormals_are_flushed_only_while_training(flush):
    seen = []

    class Watched(ResNet18Classifier):
        def on_epoch_begin(self, *args, **kwargs):
            seen.append((torch.tensor([1e-40]) * 1).item())
            return super().on_epoch_begin(*args, **kwargs)

    try:
        torch.set_flush_denormal(flush)
        Watched(width=4, max_epochs=1).fit(X, Y)
        assert ((torch.tensor([1e-40]) * 1).item() == 0) == flush
    finally:
        torch.set_flush_denormal(True)
    assert seen == [0.0]


def test_crop_and_flip_is_for_training_only():
    plain, augmented = make_net().fit(X, Y), make_net(crop_and_flip=True).fit(X, Y)
    assert not same(weights(plain), weights(augmented))
    assert np.array_equal(augmented.predict_proba(X), augmented.predict_proba(X))
    assert same(
        weights(augmented), weights(make_net(crop_and_flip=True).fit(X[:, 0], Y))
    )


def test_crop_and_flip_shifts_and_mirrors():
    from fishermask_sk.nets.resnet_module import crop_and_flip

    images = torch.arange(1.0, 65.0).reshape(1, 1, 8, 8).repeat(200, 2, 1, 1)
    out = crop_and_flip(images)
    assert out.shape == images.shape
    assert torch.equal(out[:, 0], out[:, 1])  # channels move together
    padded = torch.nn.functional.pad(images[0, 0], (1, 1, 1, 1))
    views = [padded[r : r + 8, c : c + 8] for r in range(3) for c in range(3)]
    views += [view.flip(-1) for view in views]
    found = {
        next(i for i, view in enumerate(views) if torch.equal(view, image))
        for image in out[:, 0]
    }
    assert found == set(range(18))


# ---------------------------------------------------------------------- scikit-learn's
# and skorch's machinery


def test_parameters_clone_repr_and_silence(capsys):
    net = make_net(classes=[0, 1, 2], optimizer__weight_decay=0.1)
    twin = clone(net)
    assert twin.get_params().keys() == net.get_params().keys()
    assert twin.width == 4
    assert twin.optimizer__weight_decay == 0.1
    assert repr(ResNet18Classifier()) == "ResNet18Classifier()"
    assert repr(twin).startswith("ResNet18Classifier(classes=[0, 1, 2], max_epochs=2,")
    twin.set_params(width=8, random_state=1).fit(X, Y)
    assert twin.module_.conv1.weight.shape[0] == 8
    assert twin.optimizer_.param_groups[0]["weight_decay"] == 0.1
    clone(twin).fit(X, Y).fit(X, Y)
    assert clone(twin)._repr_html_()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""


@pytest.mark.parametrize(
    "copied", [lambda net: pickle.loads(pickle.dumps(net)), copy.deepcopy]
)
def test_a_copy_of_a_fitted_net_predicts_the_same(fitted, copied):
    twin = copied(fitted)
    assert np.array_equal(twin.predict_proba(X), fitted.predict_proba(X))
    assert list(twin.classes_) == [0, 1, 2]
    assert same(weights(twin.fit(X, Y)), weights(fitted))
    assert not hasattr(twin, "dataset_train_")


def test_in_a_pipeline_a_grid_search_and_cross_validation():
    flat, labels = X.reshape(24, 64), np.array(["a", "b", "c"])[Y]
    pipeline = make_pipeline(
        FunctionTransformer(lambda rows: rows.reshape(-1, 1, 8, 8)), make_net()
    )
    assert pipeline.fit(flat, labels).predict(flat).shape == (24,)
    search = GridSearchCV(
        make_net(),
        {"width": [2, 4], "lr": [1e-3]},
        cv=2,
        scoring="roc_auc_ovr",
        error_score="raise",
    )
    search.fit(X, labels)
    assert (
        search.best_estimator_.module_.conv1.weight.shape[0]
        == search.best_params_["width"]
    )
    assert list(search.classes_) == ["a", "b", "c"]
    assert set(cross_val_predict(make_net(), X, labels, cv=2)) <= {"a", "b", "c"}


def test_partial_fit_goes_on_from_the_weights():
    net = make_net(batch_size=8).partial_fit(X[Y != 1], Y[Y != 1], classes=[0, 1, 2])
    first = weights(net)
    module = net.module_
    net.partial_fit(X, Y)
    assert net.module_ is module
    assert not same(first, weights(net))
    assert net.predict_proba(X).shape == (24, 3)
    with pytest.raises(
        ValueError,
        match=r"y holds \[7\], not among the 3 classes \[0, 1, 2\]; "
        r"name every class with classes=",
    ):
        net.partial_fit(X, np.where(Y == 1, 7, Y))


def test_warm_start_goes_on_and_fit_starts_anew():
    warm = make_net(warm_start=True).fit(X, Y)
    module = warm.module_
    assert warm.fit(X[:12], Y[:12]).module_ is module
    cold = make_net().fit(X, Y)
    module = cold.module_
    assert (
        cold.fit(np.repeat(X, 3, axis=1), np.array(["x", "y", "z"])[Y]).module_
        is not module
    )
    assert cold.image_shape_ == (3, 8, 8)
    assert list(cold.classes_) == ["x", "y", "z"]


def test_validation_parts_and_callbacks():
    labels = np.array(["a", "b", "c"])[Y]
    net = make_net(
        train_split=ValidSplit(4, stratified=True), max_epochs=3, stop_accuracy=None
    ).fit(X, labels)
    assert len(net.history[:, "valid_acc"]) == 3
    assert 0 <= net.history[-1, "valid_acc"] <= 1
    net = make_net(train_split=predefined_split(Dataset(X, Y.astype(np.int64)))).fit(
        X, Y
    )
    assert "valid_loss" in net.history[-1]
    silent = make_net(callbacks="disable", min_steps=20, max_epochs=60, width=8).fit(
        X, Y
    )
    assert 20 <= silent.n_steps_ < 60  # the stop rule needs no callbacks


def test_verbose_prints_a_line_per_epoch(capsys):
    make_net(verbose=1).fit(X, Y)
    assert "train_acc" in capsys.readouterr().out


@pytest.mark.parametrize("verbose", [0, 1])
def test_verbose_shows_a_bar_where_there_is_long_to_wait(verbose, capsys, monkeypatch):
    """Before the first epoch's line, with a Dataset whose images lie in files."""
    clock = itertools.count(step=60.0)  # a minute passes between two looks
    monkeypatch.setattr(tqdm.std, "time", clock.__next__)
    make_net(verbose=verbose, max_epochs=1).fit(
        torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    )
    shown = capsys.readouterr().err
    for step in ("labels of a Dataset", "epoch 1, train"):
        assert (step in shown) == bool(verbose)


def test_an_interrupt_keeps_the_net_usable():
    class Interrupted(ResNet18Classifier):
        def on_epoch_begin(self, *args, **kwargs):
            if len(self.history) == 1:
                raise KeyboardInterrupt
            return super().on_epoch_begin(*args, **kwargs)

        def get_split_datasets(self, *args, **kwargs):
            if self.lr == 0:
                raise KeyboardInterrupt
            return super().get_split_datasets(*args, **kwargs)

    for lr in (1e-3, 0):
        net = Interrupted(width=4, lr=lr).fit(X, Y)
        assert net.predict(X).shape == (24,)
        assert "dataset_train_" not in vars(net)


def test_every_device(device):
    net = make_net(device=device.type, batch_size=8, crop_and_flip=True).fit(X, Y)
    assert next(net.module_.parameters()).device.type == device.type
    assert same(weights(net), weights(clone(net).fit(torch.tensor(X), Y)))
    assert net.predict(torch.tensor(X, device=device)).shape == (24,)


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"width": 0}, r"width=0 is not an integer of at least 1; pass one"),
        ({"width": 16.0}, r"width=16.0 is not an integer"),
        ({"min_steps": -1}, r"min_steps=-1 is not an integer of at least 0"),
        ({"max_epochs": 0}, r"max_epochs=0 is not an integer of at least 1"),
        (
            {"stem": "large"},
            r"stem='large' is unknown; pass one of 'small', 'imagenet'",
        ),
        (
            {"stop_accuracy": 99},
            r"stop_accuracy=99 is not a share in \(0, 1\]; pass one, or None",
        ),
        (
            {"stop_accuracy": "a"},
            r"stop_accuracy='a' is not a share in \(0, 1\]; pass one, or None",
        ),
        ({"stop_accuracy": True}, r"stop_accuracy=True is not a share"),
        ({"stop_accuracy": float("nan")}, r"stop_accuracy=nan is not a share"),
        (
            {"batch_size": "a"},
            r"batch_size='a' is no integer; pass 2 or more, or -1 for all samples",
        ),
        ({"batch_size": None}, r"batch_size=None is no integer; pass 2 or more"),
        ({"batch_size": 2.5}, r"batch_size=2.5 is no integer; pass 2 or more"),
        ({"batch_size": True}, r"batch_size=True is no integer"),
        ({"batch_size": 0}, r"batch_size=0 is too small for BatchNorm"),
        ({"batch_size": -2}, r"batch_size=-2 is too small for BatchNorm"),
        (
            {"iterator_valid__batch_size": 0},
            r"batch_size=0 is too small; pass 1 or more, or -1",
        ),
        (
            {"iterator_valid__batch_size": "a"},
            r"batch_size='a' is no integer; pass 1 or more",
        ),
        (
            {"batch_size": 1},
            r"batch_size=1 is too small for BatchNorm; pass 2 or more, or -1",
        ),
        ({"iterator_train__batch_size": 1}, r"batch_size=1 is too small for BatchNorm"),
        (
            {"weights": "DEFAULT"},
            r"weights='DEFAULT' do not fit width=4, stem='small'; "
            r"set width=64 and stem='imagenet'",
        ),
        (
            {"module__width": 3},
            r"module__width is not a parameter of ResNet18Classifier; "
            r"set width=, stem=",
        ),
        (
            {"weights": "DEFAULT", "width": 64, "stem": "imagenet"},
            r"take 3 channels, but X has 1; repeat the channel",
        ),
        ({"widht": 3}, r"unexpected argument\(s\) widht"),
    ],
)
def test_wrong_parameters_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        make_net(**params).fit(X, Y)


def test_unknown_weights_are_named():
    net = make_net(weights="IMAGENET22K", width=64, stem="imagenet")
    with pytest.raises(
        ValueError,
        match=r"weights='IMAGENET22K' is unknown.*pass one of 'IMAGENET1K_V1'",
    ):
        net.fit(np.repeat(X, 3, axis=1), Y)


@pytest.mark.parametrize("stop_accuracy", [1, 0.5, np.float32(0.5)])
@pytest.mark.parametrize("batch_size", [np.int64(8), -1])
def test_numbers_of_any_kind(batch_size, stop_accuracy):
    net = make_net(
        batch_size=batch_size, stop_accuracy=stop_accuracy, iterator_valid__batch_size=1
    )
    assert net.fit(X, Y).predict(X).shape == (24,)


def test_weights_that_cannot_be_downloaded_are_named_and_nothing_printed(
    tmp_path, monkeypatch, capfd
):
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    net = make_net(weights="DEFAULT", width=64, stem="imagenet")
    message = (
        r"weights='DEFAULT' could not be loaded from https://.*resnet18.*pth "
        r"\(.*urlopen error.*\); fit once with "
        r"a network connection, put that file into .*checkpoints, or set weights=None\."
    )
    with pytest.raises(OSError, match=message):
        net.fit(np.repeat(X, 3, axis=1), Y)
    assert not net.initialized_
    assert capfd.readouterr() == ("", "")
    with pytest.raises(OSError, match=message):
        net.set_params(verbose=1).fit(np.repeat(X, 3, axis=1), Y)
    assert "Downloading" in capfd.readouterr().out


BROKEN = X.copy()
BROKEN[4, 0, 0, 0] = np.nan
BROKEN[7, 0, 0, 0] = np.inf


class Endless(torch.utils.data.IterableDataset):
    """Pairs without a length."""

    def __iter__(self):
        yield X[0], 0


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (
            X.reshape(24, 64),
            Y,
            ValueError,
            r"X has shape \(24, 64\); expected images \(n_samples, channels, ",
        ),
        (X[:0], Y[:0], ValueError, r"X holds no samples"),
        (
            X.transpose(0, 2, 3, 1),
            Y,
            ValueError,
            r"X has shape \(24, 8, 8, 1\), channels last; .*use X.transpose",
        ),
        (
            (X * 255).astype(np.int64),
            Y,
            ValueError,
            r"X has dtype int64; expected floats, or uint8 from 0 to 255",
        ),
        (torch.ones(24, 8, 8, dtype=torch.int32), Y, ValueError, r"X has dtype int32"),
        (
            BROKEN,
            Y,
            ValueError,
            r"X has NaN or infinite values in 2 of 24 images, the first at position 4",
        ),
        (
            torch.tensor(BROKEN),
            Y,
            ValueError,
            r"NaN or infinite values in 2 of 24 images",
        ),
        (
            SliceDataset([("not an image",)]),
            Y,
            ValueError,
            r"X holds str objects; .*convert them to arrays or tensors",
        ),
        (
            X,
            Y[:20],
            ValueError,
            r"X holds 24 images and y 20 labels; pass one label for each image",
        ),
        (
            X,
            Y[:, None],
            ValueError,
            r"y has shape \(24, 1\); expected one label per sample.*use y.ravel\(\)",
        ),
        (
            X,
            np.eye(3)[Y],
            ValueError,
            r"y has shape \(24, 3\); .*use y.argmax\(axis=1\) of one-hot rows",
        ),
        (X, [], ValueError, r"y holds no labels"),
        (
            X,
            Y + 0.5,
            ValueError,
            r"y has values of type float; expected whole numbers or strings",
        ),
        (
            X,
            np.array([0, "a"] * 12, dtype=object),
            ValueError,
            r"y has values of type int, str; .*not both",
        ),
        (
            X,
            np.zeros(24, int),
            ValueError,
            r"y holds the single class 0; label a sample of another class",
        ),
        (
            X,
            ["a"] * 24,
            ValueError,
            r"y holds the single class 'a'; label a sample of another class",
        ),
        (
            X[:1],
            [0],
            ValueError,
            r"X holds a single image, which BatchNorm cannot normalise; "
            r"label at least two",
        ),
        (X, None, ValueError, r"y is None, but X is no Dataset that holds labels"),
        (
            Endless(),
            None,
            TypeError,
            r"X is the Endless of unknown length; pass a Dataset with __len__",
        ),
    ],
)
def test_wrong_data_is_refused_and_the_net_left_alone(images, labels, error, message):
    net = make_net().fit(X, Y)
    before, module = weights(net), net.module_
    with pytest.raises(error, match=message):
        net.fit(images, labels)
    assert net.module_ is module
    assert same(before, weights(net))
    assert list(net.classes_) == [0, 1, 2]


class Stumbling(ResNet18Classifier):
    """Fails in its second epoch where lr is 0."""

    def on_epoch_begin(self, *args, **kwargs):
        if self.lr == 0 and len(self.history) == 1:
            raise RuntimeError("out of memory")
        return super().on_epoch_begin(*args, **kwargs)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"device": "gpu"}, r"device type at start of device string: gpu"),
        ({"lr": 0}, r"out of memory"),
        (
            {"width": 64, "stem": "imagenet", "weights": "none such"},
            r"weights='none such' is unknown",
        ),
    ],
)
def test_a_refit_that_fails_leaves_the_net_as_it_was(params, message):
    other, labels = np.repeat(X, 3, axis=1), np.array(["c", "d"])[Y % 2]
    net = Stumbling(width=4, min_steps=2, max_epochs=2, random_state=0).fit(X, Y)
    usual = {name: net.get_params().get(name) for name in params}
    probabilities = net.predict_proba(X)
    net.set_params(**params)
    before = dict(vars(net))
    with pytest.raises((RuntimeError, ValueError), match=message):
        net.fit(other, labels)
    assert vars(net).keys() == before.keys()
    assert all(vars(net)[name] is value for name, value in before.items())
    assert list(net.classes_) == [0, 1, 2]
    assert net.image_shape_ == (1, 8, 8)
    net.set_params(**usual)
    assert np.array_equal(net.predict_proba(X), probabilities)
    new = Stumbling(**{"width": 4, "max_epochs": 2, **params})
    for fit in (new.fit, new.partial_fit):
        with pytest.raises((RuntimeError, ValueError), match=message):
            fit(other, labels)
        assert not new.initialized_
        assert not hasattr(new, "classes_")


def test_sparse_images_are_refused():
    from scipy.sparse import csr_matrix

    with pytest.raises(TypeError, match=r"X is a sparse matrix of shape \(24, 64\)"):
        make_net().fit(csr_matrix(X.reshape(24, 64)), Y)


def test_labels_outside_classes_are_named():
    with pytest.raises(
        ValueError,
        match=r"y holds \[2\], not among the 2 classes \[0, 1\]; "
        r"name every class with classes=",
    ):
        make_net(classes=[0, 1]).fit(X, Y)
    with pytest.raises(
        ValueError,
        match=r"classes=3 is no list of labels; name every class, .*range\(10\)",
    ):
        make_net(classes=3).fit(X, Y)


def test_images_unlike_those_of_fit_are_refused(fitted):
    message = (
        r"images of shape \(3, 8, 8\) \(channels, height, width\), "
        r"but the net was fitted on \(1, 8, 8\)"
    )
    for images in (np.repeat(X, 3, axis=1), Dataset(np.repeat(X, 3, axis=1), Y)):
        with pytest.raises(ValueError, match=message):
            fitted.predict(images)
    with pytest.raises(ValueError, match=message):
        copy.deepcopy(fitted).partial_fit(np.repeat(X, 3, axis=1), Y)
    with pytest.raises(ValueError, match="NaN or infinite values"):
        fitted.predict_proba(BROKEN)


def test_an_unfitted_net_says_so():
    with pytest.raises(NotInitializedError):
        make_net().predict(X)
    with pytest.raises(
        AttributeError,
        match=r"no classes_ before fit; call fit first, or pass classes=",
    ):
        _ = make_net().classes_
    with pytest.raises(
        ValueError,
        match=r"learns its channels and classes from data; call fit before initialize",
    ):
        make_net().initialize()


# ---------------------------------------------------------------------- validation,
# callbacks and what they see

NAMES = np.array(["bee", "cat", "dog"])
LABELS = {
    "columns": Y,
    "from 1": Y + 1,
    "gaps": Y * 10 - 7,
    "uint8": (Y + 1).astype(np.uint8),
    "strings": NAMES[Y],
    "objects": NAMES[Y].astype(object),
    "float": Y + 1.0,
}


class Pairs(torch.utils.data.Dataset):
    """A Dataset that is no skorch Dataset; without labels, of bare images."""

    def __init__(self, images, labels=None, *more):
        self.images, self.labels, self.more = images, labels, more

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if self.labels is None:
            return self.images[index]
        return (self.images[index], self.labels[index], *self.more)


def scorers():
    return [
        ("a", EpochScoring("accuracy", lower_is_better=False, name="a")),
        ("b", EpochScoring("accuracy", False, name="b", use_caching=False)),
        ("c", BatchScoring("accuracy", lower_is_better=False, name="c")),
        ("d", EpochScoring("roc_auc_ovr", lower_is_better=False, name="d")),
        ("e", EpochScoring("accuracy", False, name="e", on_train=True)),
    ]


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
@pytest.mark.parametrize("make_valid", [Dataset, Pairs])
def test_every_scorer_sees_the_labels_of_y(make_valid, labels):
    train, valid = slice(0, 18), slice(12, 24)
    net = make_net(
        max_epochs=3,
        batch_size=6,
        train_split=predefined_split(make_valid(X[valid], labels[valid])),
        # Without its cache, a scorer finds labels in a skorch Dataset only.
        callbacks=[
            pair for pair in scorers() if make_valid is Dataset or pair[0] != "b"
        ],
    )
    net.fit(X[train], labels[train])
    last = net.history[-1]
    score = net.score(X[valid], labels[valid])
    assert score not in (0, 1)  # a net that knows nothing yet, or all, would hide much
    for name in {"valid_acc", "a", "b", "c"} & last.keys():
        assert last[name] == pytest.approx(score)
    assert last["d"] == pytest.approx(
        roc_auc_score(labels[valid], net.predict_proba(X[valid]), multi_class="ovr")
    )
    assert last["e"] == pytest.approx(last["train_acc"])
    probability = net.predict_proba(X[valid])[np.arange(12), Y[valid]]
    assert last["valid_loss"] == pytest.approx(-np.log(probability).mean(), rel=1e-5)
    if np.asarray(labels).dtype.kind not in "UO":  # skorch's needs tensors of labels
        loss = loss_scoring(net, X[valid], labels[valid])
        assert loss == pytest.approx(last["valid_loss"], rel=1e-5)


def test_a_split_of_two_classes_under_a_scorer_of_named_labels():
    labels = np.where(Y == 0, "yes", "no")
    scoring = make_scorer(f1_score, pos_label="yes")
    net = make_net(
        max_epochs=3,
        train_split=ValidSplit(2, stratified=True),
        callbacks=[EpochScoring(scoring, lower_is_better=False, name="f1")],
    ).fit(X, labels)
    _, valid = ValidSplit(2, stratified=True)(Dataset(X, labels), labels)
    expected = f1_score(
        labels[valid.indices], net.predict(X[valid.indices]), pos_label="yes"
    )
    assert net.history[-1, "f1"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("valid", "message"),
    [
        (Dataset(X, Y + 1), r"y holds \[3\], not among the 3 classes \[0, 1, 2\]"),
        (Dataset(X, NAMES[Y]), r"y holds \['bee', 'cat', 'dog'\], not among the 3"),
        (Dataset(X[:, :, :4], Y), r"images of shape \(1, 4, 8\) \(channels, height"),
        (Pairs(X), r"validation set of train_split holds images without labels; pass"),
    ],
)
def test_wrong_validation_sets_are_refused(valid, message):
    with pytest.raises(ValueError, match=message):
        make_net(train_split=predefined_split(valid)).fit(X, Y)


def own_statistics(net, images):
    """Mean and variance after the first convolution, under the present weights."""
    with torch.no_grad():
        seen = net.module_.conv1(torch.as_tensor(images))
    return seen.mean((0, 2, 3)), seen.var((0, 2, 3))


class Restoring(Callback):
    """Sets the weights, and not the statistics, of the second epoch at the end."""

    def on_epoch_end(self, net, **kwargs):
        if len(net.history) == 2:
            self.kept = [p.detach().clone() for p in net.module_.parameters()]

    def on_train_end(self, net, **kwargs):
        with torch.no_grad():
            for p, kept in zip(net.module_.parameters(), self.kept, strict=True):
                p.copy_(kept)


class Watching(Callback):
    def __init__(self):
        self.scores = []

    def on_epoch_end(self, net, **kwargs):
        self.scores.append(net.predict_proba(X))


@pytest.mark.parametrize("kind", ["early", "checkpoint", "weights alone"])
def test_restored_weights_have_their_own_statistics(kind, tmp_path):
    watching = Watching()
    restoring = {
        "early": EarlyStopping(
            "valid_acc", patience=6, lower_is_better=False, load_best=True
        ),
        "checkpoint": Checkpoint(
            "valid_acc_best", dirname=str(tmp_path / "best"), load_best=True
        ),
        "weights alone": Restoring(),
    }[kind]
    at_end = TrainEndCheckpoint(dirname=str(tmp_path / "end"))
    net = make_net(
        lr=0.03,
        batch_size=-1,
        max_epochs=9,
        stop_accuracy=None,
        train_split=predefined_split(Dataset(X, Y)),
        callbacks=[watching, restoring, at_end],
    ).fit(X, Y)
    scores = [(p.argmax(1) == Y).mean() for p in watching.scores]
    recorded = net.history[:, "valid_acc"]  # a checkpoint brings its history back, too
    assert scores[: len(recorded)] == pytest.approx(recorded)
    best = 1 if kind == "weights alone" else int(np.argmax(scores))
    assert best < len(scores) - 1
    assert np.array_equal(net.predict_proba(X), watching.scores[best])
    mean, variance = own_statistics(net, X)
    torch.testing.assert_close(net.module_.bn1.running_mean, mean)
    torch.testing.assert_close(net.module_.bn1.running_var, variance)
    saved = make_net(classes=[0, 1, 2], image_shape=(1, 8, 8)).initialize()
    saved.load_params(checkpoint=at_end.checkpoint_)
    assert np.array_equal(saved.predict_proba(X), net.predict_proba(X))


def test_watching_a_training_does_not_change_it():
    params = {"batch_size": 8, "crop_and_flip": True, "max_epochs": 4, "min_steps": 99}
    alone = make_net(**params).fit(X, Y)
    for watched in (
        {"callbacks": [Watching()]},
        {"train_split": predefined_split(Dataset(X, Y))},
    ):
        net = make_net(**params, **watched).fit(X, Y)
        for p, q in zip(
            alone.module_.parameters(), net.module_.parameters(), strict=True
        ):
            assert torch.equal(p, q)
        assert not {"dataset_train_", "pass_state_"} & vars(net).keys()
        if "callbacks" in watched:
            # What was monitored last is what predicts, bit for bit.
            assert net.callbacks[0].scores[-1].tolist() == net.predict_proba(X).tolist()


# ---------------------------------------------------------------------- the loss


class Focal(torch.nn.Module):
    """A loss of one's own, of logits."""

    def forward(self, logits, target):
        loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        return ((1 - (-loss).exp()) ** 2 * loss).mean()


@pytest.mark.parametrize(
    ("criterion", "fault"),
    [
        (torch.nn.NLLLoss, "it gives nan, not one finite number"),
        (torch.nn.NLLLoss(), "it gives nan"),
        (torch.nn.BCELoss, "target size"),
        (torch.nn.BCEWithLogitsLoss, "Target size"),
        (torch.nn.MSELoss, "The size of tensor a"),
        (torch.nn.CrossEntropyLoss(reduction="none"), r"it gives \[1.09"),
        (torch.nn.CrossEntropyLoss(torch.ones(2)), "weight tensor should be"),
    ],
)
def test_a_loss_that_is_none_of_logits_is_refused(criterion, fault):
    name = (
        criterion.__name__ if isinstance(criterion, type) else type(criterion).__name__
    )
    message = (
        f"criterion={name} is no loss of what this net gives, logits of shape "
        rf"\(n_samples, 3\) and a column number for each sample: .*{fault}.*"
        r"Use torch.nn.CrossEntropyLoss, the default"
    )
    # As many samples a batch as classes, which torch would spread over each other.
    net = make_net(criterion=criterion, batch_size=3)
    with pytest.raises(ValueError, match=message):
        net.fit(X, Y)
    assert not net.initialized_


@pytest.mark.parametrize("criterion", [Focal, Focal(), torch.nn.MultiMarginLoss])
def test_an_own_loss_of_logits_gives_probabilities(criterion):
    net = make_net(criterion=criterion, min_steps=20, max_epochs=60, width=8)
    p = net.fit(X, NAMES[Y]).predict_proba(X)
    assert np.allclose(p.sum(1), 1, atol=1e-6)
    assert net.score(X, NAMES[Y]) == 1
    assert np.allclose(p, net.forward(X).softmax(1), atol=1e-6)
    named = make_net(criterion=criterion, predict_nonlinearity=torch.sigmoid)
    assert named.fit(X, Y).predict_proba(X).sum(1).max() > 1.01


def test_who_overrides_the_loss_knows_what_it_takes():
    class Weighted(ResNet18Classifier):
        def get_loss(self, y_pred, y_true, X=None, training=False):
            bright = X.flatten(1).mean(1) if training else torch.ones(len(y_pred))
            return (bright * y_pred.logsumexp(1)).mean()

    net = Weighted(width=4, max_epochs=1, criterion=torch.nn.NLLLoss).fit(X, Y)
    assert np.isfinite(net.history[-1, "train_loss"])


def test_a_training_that_diverges_says_so():
    net = make_net(lr=float("inf"))
    with pytest.warns(UserWarning, match=r"Training diverged: .* lr=inf; lower lr"):
        net.fit(X, Y)


# ---------------------------------------------------------------------- before data


def test_parameters_are_loaded_into_a_fresh_net(tmp_path):
    kept = Checkpoint(dirname=str(tmp_path), monitor=None)
    params = {"classes": ["c", "a", "b"], "image_shape": (1, 8, 8)}
    fitted = make_net(callbacks=[kept], **params).fit(X, np.array(list("abc"))[Y])
    fitted.save_params(f_params=str(tmp_path / "by_hand.pt"))
    by_hand = make_net(**params).initialize()
    by_hand.load_params(f_params=str(tmp_path / "by_hand.pt"))
    by_checkpoint = make_net(**params)
    by_checkpoint.load_params(checkpoint=kept)
    for net in (by_hand, by_checkpoint, clone(by_hand).fit(X, fitted.predict(X))):
        assert list(net.classes_) == ["a", "b", "c"]
        assert net.image_shape_ == (1, 8, 8)
    for net in (by_hand, by_checkpoint):
        assert np.array_equal(net.predict_proba(X), fitted.predict_proba(X))
        assert np.array_equal(net.predict(X), fitted.predict(X))
        net.partial_fit(X, fitted.predict(X))
    with pytest.raises(ValueError, match=r"images of shape \(3, 8, 8\)"):
        by_hand.predict(np.repeat(X, 3, axis=1))


def test_initialize_before_data_is_the_start_of_fit():
    state = torch.get_rng_state()
    fresh = make_net(classes=range(3), image_shape=[1, 8, 8]).initialize()
    assert torch.equal(state, torch.get_rng_state())
    assert fresh.predict_proba(X).shape == (24, 3)
    assert same(weights(fresh.partial_fit(X, Y)), weights(make_net().fit(X, Y)))
    # Initialized again, the net is that of its parameters.
    fresh.set_params(classes=list("ab"), image_shape=(3, 4, 4)).initialize()
    assert fresh.predict_proba(np.ones((2, 3, 4, 4))).shape == (2, 2)
    assert list(fresh.classes_) == ["a", "b"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, r"learns its channels and classes from data; call fit before .* or pass"),
        ({"classes": [0, 1]}, r"or pass image_shape=\(channels, height, width\) and"),
        ({"image_shape": (1, 8, 8)}, r"height, width\) and classes="),
        ({"image_shape": (8, 8), "classes": [0, 1]}, r"image_shape=\(8, 8\) is not \("),
        ({"image_shape": (0, 8, 8), "classes": [0, 1]}, r"three positive integers"),
        ({"image_shape": 8, "classes": [0, 1]}, r"image_shape=8 is not \(channels"),
        ({"image_shape": (1, 8, 8), "classes": 3}, r"classes=3 is no list of labels"),
        (
            {
                "image_shape": (1, 8, 8),
                "classes": [0, 1],
                "weights": "DEFAULT",
                "width": 64,
                "stem": "imagenet",
            },
            r"take 3 channels, but image_shape=\(1, 8, 8\) has 1; repeat",
        ),
    ],
)
def test_a_net_that_cannot_be_made_before_data_says_why(params, message):
    net = make_net(**params)
    with pytest.raises(ValueError, match=message):
        net.initialize()
    assert not net.initialized_
    assert not hasattr(net, "image_shape_")


def test_images_unlike_image_shape_are_refused():
    net = make_net(image_shape=(3, 8, 8))
    with pytest.raises(
        ValueError,
        match=r"images of shape \(1, 8, 8\) .*but image_shape=\(3, 8, 8\); resize",
    ):
        net.fit(X, Y)


# ---------------------------------------------------------------------- partial_fit


@pytest.mark.parametrize("augment", [False, True])
def test_the_first_partial_fit_is_a_fit(augment):
    params = {"batch_size": 8, "crop_and_flip": augment}
    for seed in (3, np.random.RandomState(3)):
        first = make_net(random_state=copy.deepcopy(seed), **params).partial_fit(X, Y)
        assert same(
            weights(first),
            weights(make_net(random_state=copy.deepcopy(seed), **params).fit(X, Y)),
        )


@pytest.mark.parametrize("again", ["partial_fit", "warm fit"])
def test_training_that_goes_on_draws_another_order(again):
    orders = []

    class Watched(ResNet18Classifier):
        def train_step_single(self, batch, **fit_params):
            orders[-1].extend(batch[0][:, 0, 0, 0].tolist())
            return super().train_step_single(batch, **fit_params)

    def train():
        orders.clear()
        net = Watched(
            width=2, max_epochs=2, random_state=5, warm_start=again == "warm fit"
        )
        for _ in range(3):
            orders.append([])
            getattr(net, "fit" if net.warm_start else "partial_fit")(X, Y)
        return net, [tuple(order) for order in orders]

    net, first = train()
    twin, second = train()
    assert len(set(first)) == 3
    assert first == second
    assert same(weights(net), weights(twin))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"width": 8}, r"width=8, but this net was built with width=4, and training"),
        (
            {"stem": "imagenet"},
            r"stem='imagenet', but this net was built with stem='sm",
        ),
        ({"head_bias": False}, r"head_bias=False, but .* or set head_bias=True"),
        (
            {"classes": [0, 1, 2, 3]},
            r"classes=\[0, 1, 2, 3\], but .* call fit to start",
        ),
        (
            {"image_shape": (1, 4, 4)},
            r"image_shape=\(1, 4, 4\), but this net was built",
        ),
    ],
)
def test_a_parameter_of_the_module_that_changed_stops_partial_fit(changed, message):
    net = make_net(warm_start=True).fit(X, Y)
    before, usual = weights(net), {name: net.get_params()[name] for name in changed}
    net.set_params(**changed)
    for go_on in (net.partial_fit, net.fit):
        with pytest.raises(ValueError, match=message):
            go_on(X, Y)
    assert same(before, weights(net))
    net.set_params(**usual).partial_fit(X, Y)
    if "width" in changed:
        net.set_params(warm_start=False, width=8).fit(X, Y)
        assert net.module_.conv1.weight.shape[0] == 8
        net.partial_fit(X, Y)


def test_classes_named_again_must_be_those_of_the_net():
    net = make_net().partial_fit(X, Y, classes=[0, 1, 2])
    net.partial_fit(X, Y, classes=np.array([2, 1, 0]))
    with pytest.raises(
        ValueError,
        match=r"classes=\[0, 1, 2, 3\], but this net was built for \[0, 1, 2\]; leave",
    ):
        net.partial_fit(X, Y, classes=[0, 1, 2, 3])


# ---------------------------------------------------------------------- the user's word


@pytest.mark.parametrize(
    "params",
    [
        {"optimizer__foreach": True},
        {"optimizer__foreach": False, "optimizer__amsgrad": True},
        {"optimizer__differentiable": False},
        {"optimizer__fused": False},
        {"optimizer__capturable": False},
        {"optimizer__param_groups": [("fc.*", {"lr": 0.0})]},
    ],
    ids=lambda params: next(iter(params)),
)
def test_the_optimisers_own_parameters_go_first(params):
    net = make_net(**params).fit(X, Y)
    for name, value in params.items():
        if "groups" not in name:
            assert net.optimizer_.defaults[name.removeprefix("optimizer__")] == value
    assert net.optimizer_.defaults["fused"] == (
        None
        if {"optimizer__foreach", "optimizer__differentiable"} & params.keys()
        else params.get("optimizer__fused", True)
    )


def drawn(**params):
    """The first pixel of each training image, batch by batch, of one epoch."""
    batches = []

    class Watched(ResNet18Classifier):
        def train_step_single(self, batch, **fit_params):
            batches.append([int(p) for p in batch[0][:, 0, 0, 0]])
            return super().train_step_single(batch, **fit_params)

    images = X.copy()
    images[:, 0, 0, 0] = np.arange(24)
    defaults = {"width": 2, "batch_size": 8, "max_epochs": 1, "random_state": 0}
    Watched(**{**defaults, **params}).fit(images, Y)
    return batches


def test_the_iterators_own_parameters_go_first():
    from torch.utils.data import BatchSampler, SequentialSampler, WeightedRandomSampler

    order = list(range(24))
    assert drawn(iterator_train__shuffle=False) == [order[:8], order[8:16], order[16:]]
    assert drawn(iterator_train__sampler=SequentialSampler(X[:20])) == [
        order[:7],
        order[7:14],
        order[14:20],
    ]
    assert drawn(iterator_train__sampler=iter(range(24)), max_epochs=1) == drawn(
        iterator_train__shuffle=False
    )
    only = WeightedRandomSampler([1.0] * 4 + [0.0] * 20, 16)
    state = torch.get_rng_state()
    picked = drawn(iterator_train__sampler=only)
    assert picked == drawn(iterator_train__sampler=only)
    assert torch.equal(state, torch.get_rng_state())
    assert [len(batch) for batch in picked] == [8, 8]
    assert {p for batch in picked for p in batch} <= {0, 1, 2, 3}
    batches = BatchSampler(SequentialSampler(X), 10, drop_last=True)
    assert drawn(iterator_train__batch_sampler=batches) == [order[:10], order[10:20]]
    assert len(drawn(iterator_train__drop_last=True, batch_size=23)) == 2
    assert len(drawn(batch_size=23, iterator_train__batch_sampler=None)) == 2
    seeds = [torch.Generator().manual_seed(7) for _ in range(2)]
    assert drawn(iterator_train__generator=seeds[0], random_state=1) == drawn(
        iterator_train__generator=seeds[1], random_state=2
    )
    with pytest.raises(ValueError, match="mutually exclusive"):
        drawn(iterator_train__batch_sampler=batches, iterator_train__batch_size=4)
    net = make_net(iterator_valid__batch_sampler=BatchSampler(range(24), 5, False))
    reference = make_net().fit(X, Y).predict_proba(X)
    assert np.allclose(net.fit(X, Y).predict_proba(X), reference, atol=1e-6)
    assert [len(x) for x, _ in net.get_iterator(net.get_dataset(X))] == [5] * 4 + [4]


# ---------------------------------------------------------------------- Datasets

COLOUR = np.concatenate([np.zeros_like(X), X, X[..., ::-1].copy()], axis=1)


@pytest.mark.parametrize(
    "data",
    [
        Pairs(COLOUR),
        Pairs(torch.tensor(COLOUR)),
        SliceDataset(Pairs(COLOUR)),
        torch.utils.data.TensorDataset(torch.tensor(COLOUR)),
        Pairs(COLOUR, Y, 7),
        Pairs(COLOUR, [None] * 24),
        torch.utils.data.Subset(Pairs(COLOUR), range(24)),
    ],
    ids=["bare", "tensors", "slice", "singles", "triples", "None", "subset"],
)
def test_datasets_without_labels_keep_all_their_channels(data):
    params = {"batch_size": 8}
    reference = make_net(**params).fit(COLOUR, NAMES[Y])
    net = make_net(**params).fit(data, NAMES[Y])
    assert net.image_shape_ == (3, 8, 8)
    assert same(weights(net), weights(reference))
    assert np.array_equal(net.predict_proba(data), reference.predict_proba(COLOUR))
    two = torch.utils.data.Subset(Pairs(COLOUR), [4, 5])  # a batch as long as a pair
    assert np.allclose(net.predict_proba(two), reference.predict_proba(COLOUR[4:6]))


def test_labels_of_longer_tuples_are_the_second_entry():
    net, reference = make_net().fit(Pairs(X, NAMES[Y], 7)), make_net().fit(X, NAMES[Y])
    assert same(weights(net), weights(reference))
    assert list(net.classes_) == list(NAMES)


class Files(torch.utils.data.Dataset):
    """Images by name, as a Dataset of one's own reads them."""

    def __init__(self, X, y=None):
        self.names, self.labels = X, y

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        number = int(self.names[index].split(".")[0])
        return X[number], 0 if self.labels is None else self.labels[index]


@pytest.mark.parametrize("kind", [list, np.array])
def test_images_by_name_through_a_dataset_of_ones_own(kind):
    names = kind([f"{i}.png" for i in range(24)])
    net = make_net(dataset=Files).fit(names, NAMES[Y])
    reference = make_net().fit(X, NAMES[Y])
    assert same(weights(net), weights(reference))
    assert np.array_equal(net.predict(names), reference.predict(X))


class Sized(Endless):
    def __len__(self):
        return 24


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (Endless(), TypeError, r"X is the Endless of unknown length; pass a Dataset"),
        (Sized(), TypeError, r"X is the Sized in its own order only; pass a Dataset"),
        (
            torch.utils.data.DataLoader(Pairs(X, Y)),
            TypeError,
            r"X is a DataLoader, and batches are made here; pass .* loader.dataset",
        ),
        (
            [X[0], X[1, :, :4]],
            ValueError,
            r"different shapes, \(1, 4, 8\), \(1, 8, 8\); .*resize them",
        ),
        (
            Pairs([X[0], X[1, :, :4]], [0, 1]),
            ValueError,
            r"different shapes, \(1, 4, 8\), \(1, 8, 8\); resize them",
        ),
        (Pairs([{"image": X[0]}] * 2), ValueError, r"X holds dict objects"),
    ],
    ids=["endless", "sized", "loader", "list", "unequal", "dicts"],
)
def test_pools_that_are_no_images_are_refused_in_words(fitted, data, error, message):
    net = copy.deepcopy(fitted)
    with pytest.raises(error, match=message):
        net.predict(data)
    with pytest.raises(error, match=message):
        make_net().fit(data, [0, 1])


@pytest.mark.parametrize(
    "data", [Pairs(X), torch.utils.data.TensorDataset(torch.ones(2, 8, 8))]
)
def test_a_dataset_without_labels_needs_y(data):
    with pytest.raises(
        ValueError, match=r"y is None, and the .* holds images without labels; pass a"
    ):
        make_net().fit(data)
