"""Faults seeded into the CUDA kernels and into Python files, and which tests find each of them."""
