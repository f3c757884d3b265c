"""Seeded faults in the CUDA kernels, and the proof that the tests' checks find each of them."""
