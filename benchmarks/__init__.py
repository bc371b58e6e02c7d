"""Benchmarks: for asv in bench_*.py (`make bench`), and scripts that print tables."""
