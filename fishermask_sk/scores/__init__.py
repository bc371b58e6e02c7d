"""What is cheap to know of a sample: margins, the head's inputs, and proposals by them.

Sees fitted nets. Imports `nets` and `gradients`; strategies and baselines are above it.
"""
