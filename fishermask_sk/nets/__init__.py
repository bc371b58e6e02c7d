"""Nets: our ResNet-18, any trained module as an estimator, and the seam to skorch.

Sees skorch and scikit-learn's wrappers. Imports `gradients`, and nothing above it.
`resnet` has the classifier, `training` how it is trained; `skorch_adapter` asks any net
for batches and scores, `trained` makes an estimator of a module. A query's net is put
into evaluation mode by `strategy.fisher_mask`, by way of `gradients.modules`.
"""
