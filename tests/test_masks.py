"""Masks of every kind against a slow ranking, and head, stem and candidates of real
networks.
"""

import warnings

import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F

from fishermask_sk.gradients.layers import Layout, candidate_names, find_layout
from fishermask_sk.gradients.modules import undisturbed
from fishermask_sk.strategy.masks import (
    custom_mask,
    n_kept,
    per_layer_mask,
    ranked_mask,
    top_k,
    warn_if_head_fills_mask,
)


@pytest.mark.parametrize("k", [1, 2, 7, 20])
@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_top_k_takes_the_lowest_of_equal_scores(k, levels, device):
    scores = torch.randint(
        levels, (20,), generator=torch.Generator().manual_seed(k)
    ).double()
    assert top_k(scores.to(device), k).tolist() == reference.naive_top_k(scores, k)


def test_n_kept():
    assert n_kept(0.002, 701_456) == 1402
    assert n_kept(1.0, 10) == 10
    assert n_kept(7, 10) == 7
    assert n_kept(0.01, 10) == 1
    assert n_kept(0.29, 100) == 29  # 0.29 * 100 is 28.999999999999996


def test_ranked_mask_keeps_the_head_and_fills_by_score():
    scores = torch.tensor([9.0, 1.0, 8.0, 2.0, 3.0, 0.0])
    candidates, head = [slice(0, 1), slice(2, 6)], [slice(4, 6)]
    assert ranked_mask(scores, 3, candidates).tolist() == [0, 2, 4]
    assert ranked_mask(scores, 3, candidates, head).tolist() == [0, 4, 5]
    assert ranked_mask(scores, 2, candidates, head).tolist() == [4, 5]
    assert ranked_mask(scores, 1, candidates, head).tolist() == [4]
    assert ranked_mask(scores, 99, candidates, head).tolist() == [0, 2, 3, 4, 5]


def test_per_layer_mask_takes_a_share_of_every_parameter():
    scores = torch.arange(12.0)
    slices = {"a": slice(0, 4), "b": slice(4, 5), "c": slice(5, 12)}
    candidates = [slice(0, 12)]
    assert per_layer_mask(scores, 0.3, slices, candidates).tolist() == [
        2,
        3,
        4,
        9,
        10,
        11,
    ]
    hundred = torch.arange(100.0)
    assert per_layer_mask(scores, 1.7, slices, candidates).tolist() == list(range(12))
    assert (
        len(per_layer_mask(hundred, 0.07, {"a": slice(0, 100)}, [slice(0, 100)])) == 7
    )
    head = [slice(0, 4)]
    assert per_layer_mask(scores, 0.3, slices, candidates, head).tolist() == [
        0,
        1,
        2,
        3,
        4,
        9,
        10,
        11,
    ]
    without_c = {name: slices[name] for name in "ab"}
    assert per_layer_mask(scores, 0.3, without_c, [slice(0, 5)]).tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([], "non-empty"),
        ([[1]], "one-dimensional"),
        ([0.5], "integer positions"),
        ({1, 2}, "it returned set"),
        ([True, False], "not a boolean mask"),
        ([1, 1], "position twice"),
        ([1, 4], "the first is 4"),
        ([-1], "may not be chosen"),
    ],
)
def test_custom_mask_refuses(positions, message):
    with pytest.raises(ValueError, match=message):
        custom_mask(lambda *_: positions, torch.zeros(6), 2, {}, [slice(0, 4)])


def test_custom_mask_sees_scores_k_and_slices():
    def rule(scores, k, slices):
        assert scores.shape == (6,)
        assert k == 2
        return [slices["b"].stop - 1, slices["b"].start]

    assert custom_mask(
        rule, torch.zeros(6), 2, {"b": slice(2, 5)}, [slice(2, 5)]
    ).tolist() == [2, 4]


def test_the_warning_names_k_the_head_and_the_sparsity_that_keeps_it():
    with pytest.warns(
        UserWarning, match=r"k=10 .* has 25.* sparsity=0.025 or an int of 25"
    ):
        warn_if_head_fills_mask(10, 25, 1000)
    with pytest.warns(UserWarning, match="the mask is exactly the head"):
        warn_if_head_fills_mask(25, 25, 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_head_fills_mask(26, 25, 1000)
    with pytest.warns(UserWarning, match="sparsity=") as caught:
        warn_if_head_fills_mask(10, 333, 999_983)
    smallest = float(str(caught[0].message).split("sparsity=")[1].split(" ")[0])
    assert n_kept(smallest, 999_983) >= 333


class ClassToken(nn.Module):
    """Owns a bare parameter and calls its layers out of the order in which they are
    named.
    """

    def __init__(self):
        super().__init__()
        self.a_head = nn.Linear(4, 3)
        self.token = nn.Parameter(torch.zeros(1, 4))
        self.middle = nn.Linear(4, 4)
        self.z_stem = nn.Linear(5, 4)

    def forward(self, x):
        return self.a_head(self.middle(self.z_stem(x) + self.token).relu())


def layout_of(module, batch, **kwargs):
    with undisturbed(module):
        return find_layout(module, lambda: module(batch), 3, **kwargs)


def test_head_and_stem_are_found_by_use_not_by_name():
    layout = layout_of(ClassToken(), torch.zeros(2, 5))
    assert layout.head == ("a_head.weight", "a_head.bias")
    assert layout.stem == (
        "z_stem.weight",
        "z_stem.bias",
    )  # the token never sees the input
    names = [
        "token",
        "a_head.weight",
        "a_head.bias",
        "middle.weight",
        "middle.bias",
        "z_stem.weight",
        "z_stem.bias",
    ]
    assert candidate_names("middle", layout, names) == [
        "token",
        "middle.weight",
        "middle.bias",
    ]
    assert candidate_names("last", layout, names) == ["a_head.weight", "a_head.bias"]
    assert candidate_names("all", layout, names) == names
    assert candidate_names(["*.bias", "token"], layout, names) == [
        "token",
        "a_head.bias",
        "middle.bias",
        "z_stem.bias",
    ]


def test_a_hidden_layer_as_wide_as_the_classes_is_no_head():
    net = nn.Sequential(
        nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3), nn.Softmax(1)
    )
    assert layout_of(net, torch.zeros(2, 3)) == Layout(
        ("2.weight", "2.bias"), ("0.weight", "0.bias")
    )


def test_a_convolutional_head():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    assert layout_of(net, torch.zeros(2, 1, 5, 5)).head == ("1.weight", "1.bias")


def test_the_head_can_be_named():
    layout = layout_of(ClassToken(), torch.zeros(2, 5), head="middle")
    assert layout.head == ("middle.weight", "middle.bias")
    with pytest.raises(
        ValueError, match=r"head='fc' names no module.*a_head, middle, z_stem"
    ):
        layout_of(ClassToken(), torch.zeros(2, 5), head="fc")
    with pytest.raises(ValueError, match="there are weight, bias"):
        layout_of(nn.Linear(5, 3), torch.zeros(2, 5), head="fc")


def test_a_bare_parameter_can_be_the_head():
    class Prototypes(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.rows = nn.Linear(5, 4), nn.Parameter(torch.randn(3, 4))
            self.bias, self.scale = (
                nn.Parameter(torch.zeros(3)),
                nn.Parameter(torch.ones(())),
            )

        def forward(self, x):
            x = F.normalize(self.body(x).tanh(), dim=1)
            return self.scale * (x @ F.normalize(self.rows, dim=1).T) + self.bias

    assert layout_of(Prototypes(), torch.zeros(2, 5)).head == ("rows", "bias")
    assert layout_of(Prototypes(), torch.zeros(2, 5), head="rows") == Layout(
        ("rows",), ("body.weight", "body.bias")
    )


def test_frozen_layers_count_when_asking_who_comes_first():
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    for p in net[0].parameters():
        p.requires_grad_(False)
    layout = layout_of(net, torch.zeros(2, 5))
    assert layout.stem == ("0.weight", "0.bias")
    assert [p.requires_grad for p in net.parameters()] == [False] * 2 + [True] * 4


def test_candidates_that_are_not_there():
    layout = Layout((), ("0.weight",))
    with pytest.raises(ValueError, match=r"'conv\*' matches none.*0.weight, 1.weight"):
        candidate_names("conv*", layout, ["0.weight", "1.weight"])
    with pytest.raises(ValueError, match="name it with head="):
        candidate_names("last", layout, ["0.weight"])
    with pytest.raises(ValueError, match="leaves no trainable weight"):
        candidate_names("middle", layout, ["0.weight"])
