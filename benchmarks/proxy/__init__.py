"""Cenote's proxy beside PgBouncer: the same clients, the same server, one after the other in one run.

`python -m benchmarks.proxy` is its door. It measures and asserts nothing.
"""
