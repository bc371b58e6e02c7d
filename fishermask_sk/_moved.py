"""Old module paths, one a line, for one release: what was pickled by them still loads.

A finder behind all others gives, for an old path, the module that is elsewhere now.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "_agreement": "strategy.agreement",
    "_axes": "plotting.axes",
    "_calibration": "strategy.calibration",
    "_collectives": "distributed",
    "_cures": "strategy.cures",
    "_features": "scores.features",
    "_images": "nets.images",
    "_learning_curves": "plotting.learning_curves",
    "_loaders": "nets.loaders",
    "_mask_picture": "plotting.mask",
    "_meaning": "nets.meaning",
    "_net_checks": "strategy.net_checks",
    "_nets": "nets.inside",
    "_proposals": "scores.proposals",
    "_query": "strategy.query",
    "_query_pictures": "plotting.query",
    "_query_settings": "strategy.settings",
    "_resnet_module": "nets.resnet_module",
    "_results_file": "loops.results_file",
    "_settings": "_describe",
    "_targets": "scores.targets",
    "_wrong_dtypes": "nets.wrong_dtypes",
    "active_learning": "loops.classifier",
    "candidates": "selection.candidates",
    "comparison": "loops.comparison",
    "devices": "gradients.devices",
    "directions": "strategy.directions",
    "embeddings": "selection.embeddings",
    "estimator": "nets.trained",
    "fisher": "gradients.fisher",
    "gains": "selection.gains",
    "generic": "gradients.generic",
    "head_embeddings": "selection.head_embeddings",
    "image_folder": "datasets.image_folder",
    "kernels": "selection.kernels",
    "label_studio": "datasets.label_studio",
    "labeling": "datasets.labeling",
    "layer_rules": "gradients.layer_rules",
    "layers": "gradients.layers",
    "masks": "strategy.masks",
    "modules": "gradients.modules",
    "network_report": "strategy.network_report",
    "query_strategy": "strategy.fisher_mask",
    "resnet": "nets.resnet",
    "results": "loops.results",
    "skorch_adapter": "nets.skorch_adapter",
    "surplus": "selection.surplus",
    "verification": "gradients.verification",
}


class _Moved(MetaPathFinder, Loader):
    """Finds an old path, and gives the module that is now elsewhere."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """A spec for a name in `MOVED`, None for any other."""
        package, _, old = name.partition(".")
        known = package == "fishermask_sk" and old in MOVED
        return ModuleSpec(name, self) if known else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module at its new path; its own spec is put back when it is handed on."""
        _, _, old = spec.name.partition(".")
        module = importlib.import_module(f"fishermask_sk.{MOVED[old]}")
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: it ran when it was imported by its new path."""
        module.__spec__ = self._spec


if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
    sys.meta_path.append(_Moved())
