"""Loops over rounds: a classifier that asks for labels, comparisons, and their results.

Takes any estimator and any modAL-style strategy; imports no strategy of ours.
`results_file` is what writes and reads a results file, `results` what is made of it.
"""
