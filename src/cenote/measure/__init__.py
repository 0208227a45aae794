"""Experiments on real servers: what connections cost, and what a pool saves."""
