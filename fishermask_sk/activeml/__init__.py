"""FisherMask, and the baselines that scikit-activeml lacks, as its pool query
strategies.

    query = FisherMaskQuery(random_state=0)
    query_idx = query.query(X, y, clf=SkorchClassifier(...), batch_size=10)

The only room that imports scikit-activeml (extra ``activeml``); knows all others.
`queries` has the strategies, `nets` finds the net in a classifier of scikit-activeml,
`utilities` has the gain of every candidate.
"""

try:
    from fishermask_sk.activeml.queries import (
        BaitQuery,
        FacilityLocationQuery,
        FisherMaskQuery,
        PowerMarginQuery,
        WeightedMarginQuery,
    )
except ImportError as error:
    raise ImportError(
        f"fishermask_sk.activeml needs scikit-activeml 1.0 or newer ({error}); install "
        "it, for instance by the extra: pip install 'fishermask-sk[activeml]'."
    ) from error

__all__ = [
    "BaitQuery",
    "FacilityLocationQuery",
    "FisherMaskQuery",
    "PowerMarginQuery",
    "WeightedMarginQuery",
]
