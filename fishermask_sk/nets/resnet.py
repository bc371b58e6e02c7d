"""A ResNet-18 that reads its channels and classes from the data, as a scikit-learn
classifier.

This module knows torch and skorch; torchvision is imported only where a ResNet is made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from skorch.dataset import Dataset, unpack_data
from skorch.helper import SliceDataset
from skorch.utils import is_dataset, to_tensor
from torch import nn

from fishermask_sk._types import Device, Images, Labels, RandomState
from fishermask_sk._warnings import warn_user
from fishermask_sk.nets.images import (
    as_images,
    as_labels,
    as_pairs,
    check_images,
    encode_labels,
    labels_of,
)
from fishermask_sk.nets.resnet_module import crop_and_flip, reproducible, resnet18
from fishermask_sk.nets.training import TrainedOnFew

if TYPE_CHECKING:
    from torchvision.models import ResNet18_Weights

_STEMS = ("small", "imagenet")
# What a module is built from: training cannot go on where one of them has changed.
_BUILT_FROM = ("width", "stem", "head_bias", "weights", "classes", "image_shape")


class ResNet18Classifier(TrainedOnFew):
    """ResNet-18 for images, with the defaults of a learner that starts from few labels.

    A skorch net around torchvision's residual blocks [1]_. The number of channels and
    the classes are read from the data at `fit`; every `fit` starts from fresh weights,
    trains with Adam and cross-entropy until 99 % of the training samples are right, but
    for at least `min_steps` steps, and then sets the BatchNorm statistics from the
    training samples under the final weights. Where there is a validation part, or
    callbacks, they are set after every epoch as well, so that what is monitored,
    stopped by, saved and restored is what would predict.

    Parameters
    ----------
    width : int, default=64
        Channels of the first stage; the other three have 2, 4 and 8 times as many. 64
        is the standard net of 11.2 million weights, 16 the narrow one of the FisherMask
        paper.

    stem : {"small", "imagenet"}, default="small"
        "small" begins with a 3×3 convolution of stride 1, for images up to about 64
        pixels; "imagenet" with torchvision's 7×7 convolution of stride 2 and its max
        pooling.

    head_bias : bool, default=True
        Whether the last linear layer has a bias. The paper's has none.

    weights : torchvision ``ResNet18_Weights``, str or None, default=None
        Pretrained weights to start from, as torchvision's ``resnet18`` takes them, for
        instance "DEFAULT". They fit only ``width=64, stem="imagenet"`` and three
        channels. The head is always new.

    classes : array-like of shape (n_classes,) or None, default=None
        All labels that can occur. None takes those in `y`; name them where a first
        batch may miss some.

    image_shape : tuple of (channels, height, width) or None, default=None
        Shape of the images. None takes that of `X`; with it and `classes` the net can
        be initialized, and parameters loaded, before there are any data.

    crop_and_flip : bool, default=False
        Train on randomly shifted (by up to an eighth of the side, zero padded) and
        mirrored images. Nothing is shifted at prediction.

    min_steps : int, default=100
        Optimiser steps before training may stop at `stop_accuracy`. `max_epochs` goes
        first.

    stop_accuracy : float or None, default=0.99
        Training stops after an epoch in which this share of the training samples was
        classified correctly. None trains for all `max_epochs`.

    max_epochs : int, default=200
        Ceiling for the passes over the training samples.

    lr : float, default=1e-3
        Learning rate.

    batch_size : int, default=32
        Samples per batch of a prediction, and at most per step, -1 for all at once.
        Training batches are of equal size: 50 samples make 25 and 25. Where one sample
        remains, which BatchNorm cannot normalise, it is left out of that epoch; the
        order is drawn anew every epoch.

    optimizer : torch optimiser class, default=torch.optim.Adam
        Without weight decay, as in the paper; ``optimizer__weight_decay=`` sets one.

    criterion : torch loss class, default=torch.nn.CrossEntropyLoss
        The loss of the logits that the module returns.

    train_split : callable or None, default=None
        Splits a validation part off the training samples, as in skorch.

    device : str or torch.device, default="cpu"
        Where the net is trained and used, for instance "cuda".

    random_state : int, RandomState instance or None, default=None
        Seeds the initial weights, the order of the samples and the augmentation. An int
        gives the same weights bit for bit every time, by `fit` or a first
        `partial_fit`; later ones draw another order. None draws a fresh seed. Global
        generators are left as found.

    verbose : int, default=0
        1 prints a line per epoch, and shows a bar where reading labels or an epoch
        takes more than a second.

    **kwargs
        Further parameters of :class:`skorch.NeuralNetClassifier`, ``callbacks`` or
        ``warm_start`` for instance.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels, sorted: the columns of `predict_proba`.

    image_shape_ : tuple of int
        Channels, height and width of the images.

    n_steps_ : int
        Optimiser steps of the last `fit` or `partial_fit`.

    module_ : torch.nn.Module
        The fitted net, in eval mode; its parameters are named as torchvision's.

    history_ : skorch.history.History
        Loss and accuracy of each epoch, among others.

    Notes
    -----
    Images are arrays or tensors of shape (n_samples, channels, height, width), or
    (n_samples, height, width) for one channel. uint8 images are scaled from 0…255 to
    [0, 1]; floats are taken as they are. This happens in `infer`, so that whoever
    reaches the batches through skorch's `get_dataset`, `get_iterator` and `infer`
    computes what `predict_proba` computes.

    A torch Dataset of pairs (image, label) works too, with ``y=None``: its labels are
    read once at `fit`; or one of bare images, with `y`.

    Batches, validation sets, scorers and callbacks see labels as `y` has them. Only the
    loss sees column numbers, 0 to C−1.

    What is set for the iterators and the optimiser goes before what is set here:
    ``iterator_train__sampler=``, ``iterator_train__shuffle=False`` or
    ``optimizer__foreach=True`` for instance.

    References
    ----------
    .. [1] K. He, X. Zhang, S. Ren and J. Sun, "Deep Residual Learning for Image
       Recognition", CVPR 2016.

    Examples
    --------
    >>> from fishermask_sk.datasets import load_images
    >>> from fishermask_sk.nets.resnet import ResNet18Classifier
    >>> digits = load_images("digits", subset={"0": 25, "1": 25}, random_state=0)
    >>> net = ResNet18Classifier(width=16, min_steps=20, random_state=0)
    >>> _ = net.fit(digits.X_train, digits.y_train)
    >>> net.score(digits.X_test, digits.y_test) > 0.9
    True
    >>> net.set_params(width=32)
    ResNet18Classifier(min_steps=20, random_state=0, width=32)
    """

    image_shape_: tuple[int, ...]
    classes_inferred_: np.ndarray  # skorch's name

    def __init__(
        self,
        width: int = 64,
        *,
        stem: str = "small",
        head_bias: bool = True,
        weights: str | ResNet18_Weights | None = None,
        classes: Labels | None = None,
        image_shape: tuple[int, int, int] | None = None,
        crop_and_flip: bool = False,
        min_steps: int = 100,
        stop_accuracy: float | None = 0.99,
        max_epochs: int = 200,
        lr: float = 1e-3,
        batch_size: int = 32,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        criterion: nn.Module | Callable[..., nn.Module] = nn.CrossEntropyLoss,
        train_split: Callable[..., Any] | None = None,
        device: Device = "cpu",
        random_state: RandomState = None,
        verbose: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            resnet18,
            criterion=criterion,
            classes=classes,
            optimizer=optimizer,
            lr=lr,
            max_epochs=max_epochs,
            batch_size=batch_size,
            train_split=train_split,
            device=device,
            verbose=verbose,
            **kwargs,
        )
        self.width = width
        self.stem = stem
        self.head_bias = head_bias
        self.weights = weights
        self.image_shape = image_shape
        self.crop_and_flip = crop_and_flip
        self.min_steps = min_steps
        self.stop_accuracy = stop_accuracy
        self.random_state = random_state

    # ------------------------------------------------------------------ scikit-learn's
    # side

    def fit(
        self, X: Images, y: Labels | None = None, **fit_params: Any
    ) -> ResNet18Classifier:
        """Train from fresh weights, or on from the present ones with
        ``warm_start=True``.

        Parameters
        ----------
        X : array or tensor of shape (n_samples, [channels,] height, width)
            Images, at least two: floats as they are, uint8 scaled to [0, 1]. Or a torch
            Dataset.

        y : array-like of shape (n_samples,)
            Integers, with gaps or without, or strings. None where `X` is a Dataset of
            pairs.

        **fit_params : dict
            As in skorch.

        Returns
        -------
        self : ResNet18Classifier

        Raises
        ------
        ValueError
            Where X is not images of finite values, y does not fit it or names unknown
            classes, a parameter is outside its range, or the criterion does not take
            logits and column numbers.

        TypeError
            Where X is sparse, a DataLoader, or a Dataset without positions.

        OSError
            Where pretrained `weights` cannot be downloaded.

        Notes
        -----
        After an error, whatever it is, the net is as it was; only weights that are
        trained on, with ``warm_start=True``, may have changed.
        """
        self._check_params()
        anew = not (self.warm_start and self.initialized_)
        with self._restored_on_error(anew):
            X, y = self._learn_data(X, y, None, anew)
            super().fit(X, y, **fit_params)
        return self

    def partial_fit(
        self,
        X: Images,
        y: Labels | None = None,
        classes: Labels | None = None,
        **fit_params: Any,
    ) -> ResNet18Classifier:
        """Train on from the present weights; the first call is a `fit`, and fixes the
        classes.

        Parameters
        ----------
        X, y
            As in `fit`.

        classes : array-like of shape (n_classes,) or None
            All labels that can occur, for a first call that may miss some; later ones
            need not name them again.

        **fit_params : dict
            As in skorch.

        Returns
        -------
        self : ResNet18Classifier

        Raises
        ------
        ValueError
            As `fit`, where images or labels are not like those of the first call, and
            where a parameter that the module was built from has changed since.

        Warns
        -----
        UserWarning
            Where training diverged.
        """
        self._check_params()
        anew = not self.initialized_
        with self._restored_on_error(anew):
            X, y = self._learn_data(X, y, classes, anew)
            if anew:
                self.initialize()
            try:
                with reproducible(self.random_state, n_before=len(self.history)):
                    super().partial_fit(X, y, **fit_params)
            finally:
                self._forget_training()
        if not torch.isfinite(self._weights()).all():
            warn_user(
                f"Training diverged: weights are NaN or infinite after {self.n_steps_} "
                f"steps with lr={self.lr}; lower lr, or look for outliers in X."
            )
        return self

    def predict(self, X: Images) -> np.ndarray:
        """Most probable class of each image.

        Parameters
        ----------
        X : array or tensor of shape (n_samples, [channels,] height, width)
            Images like those of `fit`.

        Returns
        -------
        y : ndarray of shape (n_samples,)
            Labels out of `classes_`.
        """
        columns = self.predict_proba(X).argmax(axis=1)
        return self.classes_[columns]

    @property
    def classes_(self) -> np.ndarray:
        """The labels, sorted, in the order of the columns of `predict_proba`."""
        if "classes_inferred_" in vars(self):
            return self.classes_inferred_
        if self.classes is not None:
            return self._named_classes(self.classes)
        raise AttributeError(
            "ResNet18Classifier has no classes_ before fit; call fit first, or pass "
            "classes=."
        )

    def _get_param_names(self) -> list[str]:
        # The module is built from this class's own parameters; skorch recollects
        # _params_to_validate.
        return [
            name
            for name in super()._get_param_names()
            if name not in ("module", "_params_to_validate")
        ]

    def __repr__(self) -> str:
        defaults = ResNet18Classifier().get_params(deep=False)
        changed = {
            name: value
            for name, value in sorted(self.get_params(deep=False).items())
            if name not in defaults or repr(value) != repr(defaults[name])
        }
        given = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        return f"{type(self).__name__}({given})"

    def _named_classes(self, labels: Any) -> np.ndarray:
        return np.unique(as_labels(labels, name="classes"))

    def _check_params(self) -> None:
        """Refuse parameters outside their range."""
        for name, least in (("width", 1), ("min_steps", 0), ("max_epochs", 1)):
            value = getattr(self, name)
            if (
                not isinstance(value, (int, np.integer))
                or isinstance(value, bool)
                or value < least
            ):
                raise ValueError(
                    f"{name}={value!r} is not an integer of at least {least}; pass one."
                )
        if self.stem not in _STEMS:
            raise ValueError(
                f"stem={self.stem!r} is unknown; pass one of "
                f"{', '.join(map(repr, _STEMS))}."
            )
        share = self.stop_accuracy
        is_number = isinstance(share, Real) and not isinstance(share, bool)
        if share is not None and not (is_number and 0 < share <= 1):
            raise ValueError(
                f"stop_accuracy={share!r} is not a share in (0, 1]; pass one, or None "
                "to train for all max_epochs."
            )
        for role, least in (("iterator_train", 2), ("iterator_valid", 1)):
            batch_size = self.get_params_for(role).get("batch_size", self.batch_size)
            wrong = None
            if not isinstance(batch_size, (int, np.integer)) or isinstance(
                batch_size, bool
            ):
                wrong = "no integer"
            elif batch_size != -1 and batch_size < least:
                wrong = (
                    "too small for BatchNorm"
                    if role == "iterator_train"
                    else "too small"
                )
            if wrong:
                raise ValueError(
                    f"batch_size={batch_size!r} is {wrong}; pass {least} or more, or "
                    "-1 for all samples."
                )
        if self.weights is not None and (self.width != 64 or self.stem != "imagenet"):
            raise ValueError(
                f"Pretrained weights={self.weights!r} do not fit width={self.width}, "
                f"stem={self.stem!r}; set width=64 and stem='imagenet', or "
                "weights=None."
            )
        shape = self.image_shape
        if shape is not None and not (
            len(np.shape(shape)) == 1
            and len(shape) == 3
            and all(isinstance(n, (int, np.integer)) and n > 0 for n in shape)
        ):
            raise ValueError(
                f"image_shape={shape!r} is not (channels, height, width); pass three "
                "positive integers, or None to take it from X."
            )
        if shape is not None and self.weights is not None and shape[0] != 3:
            raise ValueError(
                f"Pretrained weights={self.weights!r} take 3 channels, but "
                f"image_shape={shape!r} has {shape[0]}; repeat the channel three "
                "times, or set weights=None."
            )
        unknown = sorted(self.get_params_for("module"))
        if unknown:
            raise ValueError(
                f"module__{unknown[0]} is not a parameter of ResNet18Classifier; set "
                "width=, stem=, head_bias= or weights= directly."
            )

    @contextmanager
    def _restored_on_error(self, anew: bool) -> Iterator[None]:
        """Put a net that starts anew back as it was, where that fails: its old module
        is untouched until then.
        """
        before = dict(vars(self))
        try:
            yield
        except BaseException:
            if anew:
                self.__dict__.clear()
                self.__dict__.update(before)
            raise

    def _learn_data(
        self, X: Any, y: Any, classes: Any, anew: bool
    ) -> tuple[Any, np.ndarray]:
        """Check images and labels, and take channels and classes from them unless
        training goes on.
        """
        images = self._images(X, y)
        if y is None and isinstance(images, SliceDataset):
            y = labels_of(images.dataset, self.verbose)
        if y is None:
            raise ValueError(
                "y is None, but X is no Dataset that holds labels; pass a label for "
                "each image."
            )
        shape = check_images(images, None if anew else self.image_shape_)
        if anew and self.image_shape is not None and shape != tuple(self.image_shape):
            raise ValueError(
                f"X has images of shape {shape} (channels, height, width), but "
                f"image_shape={self.image_shape!r}; resize them, or leave image_shape "
                "out."
            )
        y = as_labels(y)
        if len(images) != len(y):
            raise ValueError(
                f"X holds {len(images)} images and y {len(y)} labels; pass one label "
                "for each image."
            )
        if len(images) < 2:
            raise ValueError(
                "X holds a single image, which BatchNorm cannot normalise; label at "
                "least two."
            )
        if self.weights is not None and shape[0] != 3:
            raise ValueError(
                f"Pretrained weights={self.weights!r} take 3 channels, but X has "
                f"{shape[0]}; repeat the channel three times, or set weights=None."
            )
        if anew:
            named = self.classes if classes is None else classes
            known = np.unique(y) if named is None else self._named_classes(named)
            if len(known) < 2:
                raise ValueError(
                    f"y holds the single class {known.tolist()[0]!r}; label a sample "
                    "of another class, or name all of them with classes=."
                )
        else:
            self._check_unchanged(classes)
            known = self.classes_
        encode_labels(y, known)
        self.image_shape_, self.classes_inferred_ = shape, known
        return X if self._has_own_dataset else images, y

    @property
    def _has_own_dataset(self) -> bool:
        return self.dataset is not Dataset

    def _images(self, X: Any, y: Any) -> Any:
        """X as an array, tensor or SliceDataset of images, as the net's Dataset sees
        them.
        """
        if self._has_own_dataset and not is_dataset(X):
            X = super().get_dataset(X, y)
        return SliceDataset(as_pairs(X)) if is_dataset(X) else as_images(X)

    def _check_unchanged(self, classes: Any) -> None:
        """Refuse to train on where the module would be built otherwise now."""
        for name, value in self.built_from_.items():
            now = getattr(self, name)
            if not np.array_equal(np.asarray(now), np.asarray(value)):
                raise ValueError(
                    f"{name}={now!r}, but this net was built with {name}={value!r}, "
                    "and training goes on from its weights; call fit to start anew "
                    f"(with warm_start=False), or set {name}={value!r}."
                )
        if classes is not None and not np.array_equal(
            self._named_classes(classes), self.classes_
        ):
            raise ValueError(
                f"classes={classes!r}, but this net was built for "
                f"{self.classes_.tolist()}; leave classes out, or call fit to start "
                "anew."
            )

    # ------------------------------------------------------------------ skorch's side

    def initialize(self) -> ResNet18Classifier:
        """Make fresh weights, for the data of `fit` or for `image_shape` and `classes`.

        Returns
        -------
        self : ResNet18Classifier

        Raises
        ------
        ValueError
            Where neither data nor parameters tell the shape and the classes.
        """
        self._check_params()
        with self._restored_on_error(True), reproducible(self.random_state):
            changed = "built_from_" in vars(self) and not np.array_equal(
                np.asarray(self.classes), np.asarray(self.built_from_["classes"])
            )
            if self.image_shape is not None:
                self.image_shape_ = tuple(int(n) for n in self.image_shape)
            if self.classes is not None and (
                changed or "classes_inferred_" not in vars(self)
            ):
                self.classes_inferred_ = self._named_classes(self.classes)
            super().initialize()
        return self

    def initialize_module(self) -> ResNet18Classifier:
        """Make a ResNet-18 for the channels and classes of the data."""
        if not {"image_shape_", "classes_inferred_"} <= vars(self).keys():
            raise ValueError(
                "ResNet18Classifier learns its channels and classes from data; call "
                "fit before initialize or load_params, or pass image_shape=(channels, "
                "height, width) and classes=."
            )
        self.module_ = resnet18(
            self.image_shape_[0],
            len(self.classes_),
            self.width,
            self.stem,
            self.head_bias,
            self.weights,
            progress=bool(self.verbose),
        )
        self.built_from_ = {name: getattr(self, name) for name in _BUILT_FROM}
        return self

    def check_data(self, X: object, y: object = None) -> None:
        """Do nothing: images and labels were checked before the weights were
        touched.
        """

    def get_dataset(self, X: Images, y: Labels | None = None) -> Any:
        """As in skorch, after a check of the images; integers become int64."""
        if not is_dataset(X) and self._has_own_dataset:
            X = super().get_dataset(X, y)
        images = self._images(X, y)
        check_images(images, vars(self).get("image_shape_"))
        if is_dataset(X):
            return images.dataset
        if y is not None:
            y = as_labels(y)
            y = y.astype(np.int64) if y.dtype.kind in "iu" else y
        return super().get_dataset(images, y)

    def infer(self, x: Any, **fit_params: Any) -> torch.Tensor:
        """Logits of a batch; uint8 is scaled to [0, 1], and a missing channel axis
        added.

        Parameters
        ----------
        x : tensor or array of shape (n_samples, [channels,] height, width)
            A batch as `get_iterator` yields it.

        **fit_params : dict
            As in skorch.

        Returns
        -------
        logits : tensor of shape (n_samples, n_classes)
        """
        x = to_tensor(x, device=self.device)
        dtype = next(self.module_.parameters()).dtype
        x = x.to(dtype) / 255 if x.dtype == torch.uint8 else x.to(dtype)
        return super().infer(x.unsqueeze(1) if x.ndim == 3 else x, **fit_params)

    def train_step_single(
        self, batch: Any, **fit_params: Any
    ) -> dict[str, torch.Tensor]:
        """As in skorch; shifts and mirrors the images where `crop_and_flip` is set."""
        if self.crop_and_flip:
            x, y = unpack_data(batch)
            batch = crop_and_flip(to_tensor(x, device=self.device)), y
        return super().train_step_single(batch, **fit_params)

    def get_loss(
        self,
        y_pred: torch.Tensor,
        y_true: Labels,
        X: object = None,
        training: bool = False,
    ) -> torch.Tensor:
        """As in skorch, of labels as `y` has them: the one place that turns them into
        columns.
        """
        return super().get_loss(y_pred, self._columns(y_true), X=X, training=training)

    def _columns(self, labels: Any) -> torch.Tensor:
        """Column numbers of a batch's labels."""
        return to_tensor(
            encode_labels(as_labels(labels), self.classes_), device=self.device
        )

    def _check_criterion(self) -> None:
        """Refuse a loss that is not one of logits and column numbers.

        Who overrides `get_loss` knows what it takes. There is one row more than
        columns, so that losses of two equal shapes, which torch would spread over each
        other, fail as well.
        """
        if type(self).get_loss is not ResNet18Classifier.get_loss:
            return
        n_classes = len(self.classes_)
        labels = np.append(self.classes_, self.classes_[:1])
        logits = -torch.ones(n_classes + 1, n_classes, device=self.device)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the shapes that then fail
                loss = self.get_loss(logits, labels)
            fault = f"it gives {loss.tolist()}, not one finite number"
            sound = loss.ndim == 0 and bool(torch.isfinite(loss))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            sound, fault = False, str(error).splitlines()[0].rstrip(".")
        if not sound:
            raise ValueError(
                f"criterion={type(self.criterion_).__name__} is no loss of what this "
                f"net gives, logits of shape (n_samples, {n_classes}) and a column "
                f"number for each sample: {fault}. Use torch.nn.CrossEntropyLoss, the "
                "default, or a loss of logits."
            )

    def on_train_begin(
        self, net: object, X: object = None, y: object = None, **kwargs: Any
    ) -> None:
        """Check the criterion, and start counting steps."""
        self._check_criterion()
        super().on_train_begin(net, X, y, **kwargs)

    def _get_predict_nonlinearity(self) -> Callable[[Any], Any]:
        # The module gives logits whatever the loss of them is called.
        if self.predict_nonlinearity == "auto":
            return partial(torch.softmax, dim=-1)
        return super()._get_predict_nonlinearity()
