"""What is cheap to know of a sample: margins, the head's inputs, and proposals by them.

Sees fitted nets. Imports `nets` and `gradients`; strategies and baselines are above it.
`proposals` has the margins and who may be picked, `features` the inputs of a head,
`targets` the samples that labels are for.
"""
