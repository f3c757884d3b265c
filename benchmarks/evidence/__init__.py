"""Does an attention earn its place? ``cd benchmarks && python -m evidence --help``."""
