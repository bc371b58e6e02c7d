"""Nets: our ResNet-18, any trained module as an estimator, and the seam to skorch.

Sees skorch and scikit-learn's wrappers. Imports `gradients`, and nothing above it.
`resnet` has the classifier, `training` how it is trained; `skorch_adapter` puts any net
into evaluation mode by way of `gradients.modules`.
"""
