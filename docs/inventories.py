"""Where other projects describe the names that this site links to, for builds that
cannot ask them.

Sphinx fetches each project's own inventory; without a network it takes the one that is
written here. The addresses follow each project's own scheme; add a name where a page
needs one.
"""

import zlib
from pathlib import Path

SKLEARN = "modules/generated/{name}.html#{name}"
PROJECTS = {
    "sklearn": (
        "https://scikit-learn.org/stable/",
        {
            "sklearn.base.BaseEstimator": SKLEARN,
            "sklearn.base.ClassifierMixin": SKLEARN,
            "sklearn.base.MetaEstimatorMixin": SKLEARN,
            "sklearn.base.clone": SKLEARN,
            "sklearn.model_selection.GridSearchCV": SKLEARN,
            "sklearn.model_selection.RandomizedSearchCV": SKLEARN,
            "sklearn.pipeline.Pipeline": SKLEARN,
            "sklearn.utils.Bunch": SKLEARN,
        },
    ),
    "skorch": (
        "https://skorch.readthedocs.io/en/stable/",
        {
            "skorch.classifier.NeuralNetClassifier": "classifier.html#{name}",
            "skorch.helper.SliceDataset": "helper.html#{name}",
            "skorch.helper.SliceDict": "helper.html#{name}",
        },
    ),
    "torch": (
        "https://docs.pytorch.org/docs/stable/",
        {
            "torch.Tensor": "tensors.html#{name}",
            "torch.nn.Module": "generated/{name}.html#{name}",
            "torch.utils.data.Dataset": "data.html#{name}",
        },
    ),
    "modal": (
        "https://modal-python.readthedocs.io/en/latest/",
        {
            "modAL.models.learners.ActiveLearner": (
                "content/apireference/models.html#{name}"
            ),
        },
    ),
    "numpy": (
        "https://numpy.org/doc/stable/",
        {
            "numpy.ndarray": "reference/generated/{name}.html#{name}",
        },
    ),
    "pandas": (
        "https://pandas.pydata.org/docs/",
        {
            "pandas.DataFrame": "reference/api/{name}.html#{name}",
        },
    ),
    "python": (
        "https://docs.python.org/3/",
        {
            "bool": "library/functions.html#{name}",
            "dict": "library/stdtypes.html#{name}",
            "float": "library/functions.html#{name}",
            "int": "library/functions.html#{name}",
            "list": "library/stdtypes.html#{name}",
            "pathlib.Path": "library/pathlib.html#{name}",
            "str": "library/stdtypes.html#{name}",
            "tuple": "library/stdtypes.html#{name}",
        },
    ),
}


def write_inventories(folder):
    """Write one inventory a project, and return Sphinx's `intersphinx_mapping`, which
    asks the project first.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mapping = {}
    for project, (address, names) in PROJECTS.items():
        path = folder / f"{project}.inv"
        # What stands for name, kind, priority, address and title in version 2 of the
        # format.
        lines = [
            f"{name} py:{_kind(name)} 1 {place.format(name=name)} -\n"
            for name, place in names.items()
        ]
        head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
        head += "# The remainder of this file is compressed using zlib.\n"
        path.write_bytes(head.encode() + zlib.compress("".join(lines).encode()))
        mapping[project] = (address, (None, str(path)))
    return mapping


def _kind(name):
    return "function" if name.rpartition(".")[2] == "clone" else "class"
