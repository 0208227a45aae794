"""Cenote against the pools people use today, in one run: `make bench`, or `python -m benchmarks --help`.

It measures and prints; it refuses to be a test: whatever the figures are, the exit code is 0. What each
benchmark means and how to read it is in docs/benchmarks.md.
"""
