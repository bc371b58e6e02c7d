"""Loops over rounds: a classifier that asks for labels, comparisons, and their results.

Takes any estimator and any modAL-style strategy; imports no strategy of ours.
`classifier` has the loop, `rounds` what happens in each, `learner` what a strategy is
handed; `results_file` writes and reads a results file, `results` is what is made of it.
"""
