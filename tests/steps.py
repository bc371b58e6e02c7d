"""The steps of a query up to its embeddings, and nets that take them the plain way."""

import copy

import torch.nn.functional as F
from torch import nn

from fishermask_sk.gradients.modules import undisturbed
from fishermask_sk.nets.skorch_adapter import fitted_net
from fishermask_sk.strategy.query import Query
from fishermask_sk.strategy.question import Question
from fishermask_sk.strategy.ranking import find_mask


def embedded(strategy, net, X_pool, n_instances, X_labeled):
    """What `strategy.select` hands to the selection."""
    fitted = fitted_net(net)
    question = Question(
        strategy.settings(),
        fitted,
        fitted.dataset(X_pool, "X_pool")[0],
        fitted.dataset(X_labeled, "X_labeled")[0] if len(X_labeled) else None,
        len(X_pool),
        len(X_labeled),
        n_instances,
    )
    query = Query(question)
    query.propose(strategy.candidates, net, X_pool)
    with undisturbed(fitted.module):
        plan = query.plan()
        mask_indices = find_mask(question, plan, query.progress)
        if query.eligible.n_most_uncertain is not None:
            query.eligible.find_most_uncertain(query.progress)
        return query.embed(plan, mask_indices)


class OwnLinear(nn.Module):
    """What a linear layer computes, with its weights, by a call that no rule sees."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def without_product(net, head):
    """The same net, of which the head's gradients are taken as they are."""
    twin = copy.deepcopy(net)
    setattr(twin.module_, head, OwnLinear(twin.module_.get_submodule(head)))
    return twin
