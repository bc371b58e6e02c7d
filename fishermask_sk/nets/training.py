"""Training from few labels, as a skorch net: batches of equal size, an end where nearly
all samples are right, and BatchNorm statistics that belong to the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import torch
from skorch import NeuralNetClassifier
from skorch.callbacks import PassthroughScoring
from skorch.dataset import unpack_data
from skorch.utils import to_tensor
from torch import nn

from fishermask_sk._types import Images, Labels
from fishermask_sk.nets.images import collate, slow_steps

Net = TypeVar("Net", bound="TrainedOnFew")


class TrainedOnFew(NeuralNetClassifier):
    """What training does in place of skorch's; who inherits has `stop_accuracy` and
    `min_steps`.

    Attributes
    ----------
    n_steps_ : int
        Optimiser steps of the last training.
    dataset_train_, pass_state_
        Only while training: the training part, and the generator's state at the first
        pass that sets the BatchNorm statistics.
    """

    stop_accuracy: float | None
    min_steps: int
    n_steps_: int
    dataset_train_: Any
    pass_state_: torch.Tensor

    def _columns(self, labels: Any) -> torch.Tensor:
        """Column numbers of a batch's labels; here they are these."""
        return to_tensor(labels, device=self.device)

    def get_params_for_optimizer(
        self, prefix: str, named_parameters: Iterable[tuple[str, nn.Parameter]]
    ) -> tuple[Any, dict[str, Any]]:
        """As in skorch; Adam runs fused, as one call for all 62 parameters and not
        several for each, unless another way is asked for.
        """
        args, kwargs = super().get_params_for_optimizer(prefix, named_parameters)
        if (
            self.optimizer is torch.optim.Adam
            and torch.device(self.device or "cpu").type in ("cpu", "cuda")
            and not kwargs.keys() & {"foreach", "differentiable"}
        ):
            kwargs.setdefault("fused", True)
        return args, kwargs

    def get_split_datasets(
        self, X: Images, y: Labels | None = None, **split_params: Any
    ) -> tuple[Any, Any]:
        """As in skorch; the training part is remembered until the end of the
        training.
        """
        train, valid = super().get_split_datasets(X, y, **split_params)
        self.dataset_train_ = train
        if valid is None:
            return train, None
        valid = self.get_dataset(valid)
        if valid[0][1] is None:
            raise ValueError(
                "The validation set of train_split holds images without labels; pass "
                "a Dataset of pairs (image, label)."
            )
        return train, valid

    def get_iterator(self, dataset: Any, training: bool = False) -> Any:
        """As in skorch; only the training part is shuffled, and no iterator draws from
        the global generator. What the user set for it goes first.
        """
        role = "iterator_train" if training else "iterator_valid"
        iterator, given = getattr(self, role), self.get_params_for(role)
        kwargs: dict[str, Any] = {"batch_size": self.batch_size, **given}
        if kwargs["batch_size"] == -1:
            kwargs["batch_size"] = len(dataset)
        if iterator is not torch.utils.data.DataLoader:
            return iterator(dataset, **kwargs)
        kwargs = {"collate_fn": collate, "generator": torch.Generator(), **kwargs}
        trained_on = training and dataset is vars(self).get("dataset_train_")
        if trained_on and "generator" not in given:
            # Seeded from the generator of `reproducible`.
            kwargs["generator"].manual_seed(int(torch.randint(2**62, (), device="cpu")))
        if given.get("batch_sampler") is not None:
            if "batch_size" not in given:
                del kwargs["batch_size"]
        elif trained_on:
            sampler = given.get("sampler")
            # Equal batches: BatchNorm makes the gradients of a small last one noisy.
            n_samples = len(sampler if hasattr(sampler, "__len__") else dataset)
            n_batches = math.ceil(n_samples / kwargs["batch_size"])
            kwargs["batch_size"] = math.ceil(n_samples / n_batches)
            kwargs.setdefault("drop_last", n_samples % kwargs["batch_size"] == 1)
            if sampler is None:
                kwargs.setdefault("shuffle", True)
        return iterator(dataset, **kwargs)

    @property
    def _default_callbacks(self) -> list[tuple[str, Any]]:
        # on_batch_end counts both accuracies, so that no scorer has to.
        kept = [
            (name, callback)
            for name, callback in super()._default_callbacks
            if name != "valid_acc"
        ]
        accuracies = [
            (
                f"{part}_acc",
                PassthroughScoring(
                    f"{part}_acc", lower_is_better=False, on_train=part == "train"
                ),
            )
            for part in ("train", "valid")
        ]
        return kept[:-1] + accuracies + kept[-1:]

    def on_train_begin(
        self, net: object, X: object = None, y: object = None, **kwargs: Any
    ) -> None:
        """Start counting steps."""
        self.n_steps_ = 0

    def on_batch_end(
        self, net: object, batch: Any = None, training: bool = False, **kwargs: Any
    ) -> None:
        """Record the batch's accuracy."""
        self.n_steps_ += training
        columns = self._columns(unpack_data(batch)[1])
        right = kwargs["y_pred"].argmax(dim=1) == columns
        accuracy = right.float().mean().item()
        self.history.record_batch("train_acc" if training else "valid_acc", accuracy)

    def run_single_epoch(
        self,
        iterator: Iterable[Any] | None,
        training: bool,
        prefix: str,
        step_fn: Callable[..., Any],
        **kwargs: Any,
    ) -> None:
        """As in skorch; what is validated and what callbacks see has the statistics of
        its weights. A bar shows batches that take long.
        """
        watched = self.callbacks and self.callbacks != "disable"
        if not training and (iterator is not None or watched):
            self._set_statistics()
        if iterator is not None and self.verbose:
            iterator = slow_steps(iterator, f"epoch {len(self.history)}, {prefix}")
        super().run_single_epoch(iterator, training, prefix, step_fn, **kwargs)

    def notify(self, method_name: str, **kwargs: Any) -> None:
        """As in skorch; after all callbacks of an epoch, end the training where the
        stop rule says so, and where one changes the weights at the end of the training,
        restores the best ones for instance, set the statistics anew.
        """
        if method_name == "on_train_end":
            self.on_train_end(self, **kwargs)
            for _, callback in self.callbacks_:
                before = self._weights()
                callback.on_train_end(self, **kwargs)
                if not torch.equal(before, self._weights()):
                    self._set_statistics()
            return
        super().notify(method_name, **kwargs)
        if (
            method_name == "on_epoch_end"
            and self.stop_accuracy is not None
            and self.n_steps_ >= self.min_steps
        ):
            batches = self.history[-1, "batches", :, ["train_acc", "train_batch_size"]]
            accuracy, size = np.transpose(batches)
            if np.average(accuracy, weights=size) >= self.stop_accuracy:
                raise _TrainedEnough

    def fit_loop(
        self: Net,
        X: Images,
        y: Labels | None = None,
        epochs: int | None = None,
        **kwargs: Any,
    ) -> Net:
        """As in skorch, up to the stop rule."""
        with suppress(_TrainedEnough):
            super().fit_loop(X, y, epochs, **kwargs)
        return self

    def on_train_end(
        self, net: object, X: object = None, y: object = None, **kwargs: Any
    ) -> None:
        """Set the BatchNorm statistics under the final weights, and leave the module in
        eval mode.
        """
        self._set_statistics()

    def _forget_training(self) -> None:
        """Let go of the samples: a pickle must not carry them."""
        self.__dict__.pop("dataset_train_", None)
        self.__dict__.pop("pass_state_", None)

    def _weights(self) -> torch.Tensor:
        """All weights of the module, a copy of shape (n_weights,)."""
        return nn.utils.parameters_to_vector(self.module_.parameters()).detach()

    def _set_statistics(self) -> None:
        """Set the BatchNorm statistics from the training samples under the present
        weights.

        The running averages lag behind the weights, by a lot where few labels mean few
        steps. Every pass of a training takes its batches alike, and draws nothing from
        the training's own generator: the same weights have the same statistics, and
        watching a training does not change it.
        """
        if "dataset_train_" not in vars(self):  # interrupted before the first epoch
            return
        layers = [
            m
            for m in self.module_.modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]
        momenta = [layer.momentum for layer in layers]
        n_seen = 0
        self._set_training(True)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            if "pass_state_" not in vars(self):
                self.pass_state_ = torch.get_rng_state()
            torch.set_rng_state(self.pass_state_)
            try:
                for batch in self.get_iterator(self.dataset_train_, training=True):
                    x, _ = unpack_data(batch)
                    n_seen += len(x)
                    for layer in layers:
                        # The mean over samples; the first batch forgets the past.
                        layer.momentum = len(x) / n_seen
                    self.infer(x)
            finally:
                for layer, momentum in zip(layers, momenta, strict=True):
                    layer.momentum = momentum
        self._set_training(False)


class _TrainedEnough(Exception):
    """Ends `fit_loop` after the stop rule."""
