"""Nets: our ResNet-18, any trained module as an estimator, and the seam to skorch.

Sees skorch and scikit-learn's wrappers. Imports `gradients`, and nothing above it.
`skorch_adapter` puts a net into evaluation mode by way of `gradients.modules`.
"""
