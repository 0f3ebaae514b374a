"""Benchmarks: one command per published number. Results are JSON files in `results/`."""
