"""One command per published number; results are JSON files in `results/`."""
