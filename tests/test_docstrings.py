"""Docstrings that are completed from others describe every parameter, once, in the
order of the signature.
"""

import inspect
import re

import pytest

from fishermask_sk import FisherMask, baselines, fisher_mask_sampling
from fishermask_sk._docstrings import completed_by

SHARED = """
    Parameters
    ----------
    a, b : int
        Two numbers.
    c
        The third.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        Never.

    Notes
    -----
    Of the shared text.
    """


def described(documented):
    """The parameters that a docstring describes."""
    text = inspect.getdoc(documented)
    block = re.search(r"^Parameters\n-+\n(.*?)(\n\n\w+\n-+\n|\Z)", text, re.M | re.S)
    headers = re.findall(r"^(\S.*?)(?: :.*)?$", block[1], re.M)
    return [name.strip(" *") for header in headers for name in header.split(",")]


def test_what_is_lacking_is_added_in_the_order_of_the_signature():
    @completed_by(SHARED)
    def function(c, own, a, b):
        """Do it.

        Parameters
        ----------
        own : str
            Particular.

        Raises
        ------
        TypeError
            Always.

        Examples
        --------
        None.
        """

    assert inspect.getdoc(function).splitlines() == [
        *("Do it.", "", "Parameters", "----------", "c", "    The third."),
        *("own : str", "    Particular.", "a, b : int", "    Two numbers.", ""),
        *("Returns", "-------", "int", ""),
        *("Raises", "------", "TypeError", "    Always.", ""),
        *("Examples", "--------", "None."),
    ]


def test_the_first_text_that_has_a_parameter_counts():
    first = "Parameters\n----------\nx\n    First.\n"
    second = "Parameters\n----------\nx\n    Second.\ny\n    Second.\n"

    @completed_by(first, None, second)
    class Thing:
        """A thing."""

        def __init__(self, x, y):
            pass

    assert inspect.getdoc(Thing) == (
        "A thing.\n\nParameters\n----------\nx\n    First.\ny\n    Second."
    )


def test_without_docstrings_nothing_is_added():
    def bare(a):
        pass

    assert completed_by(SHARED)(bare).__doc__ is None


@pytest.mark.parametrize("name", baselines.__all__)
def test_baselines_describe_every_parameter(name):
    strategy = getattr(baselines, name)
    assert described(strategy) == list(inspect.signature(strategy).parameters)


def test_activeml_describes_every_parameter():
    activeml = pytest.importorskip("fishermask_sk.activeml", exc_type=ImportError)
    for name in activeml.__all__:
        strategy = getattr(activeml, name)
        assert described(strategy) == list(inspect.signature(strategy).parameters)
        query = list(inspect.signature(strategy.query).parameters)[1:]
        assert described(strategy.query) == query
    assert "Notes" not in inspect.getdoc(activeml.WeightedMarginQuery)
    assert "See " not in inspect.getdoc(activeml.FisherMaskQuery)


def test_the_strategy_describes_every_parameter():
    function = fisher_mask_sampling
    assert described(function) == list(inspect.signature(function).parameters)
    assert described(FisherMask) == list(inspect.signature(FisherMask).parameters)
