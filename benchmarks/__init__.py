"""Benchmarks of the operation against what a user could run instead: ``python -m benchmarks``."""
