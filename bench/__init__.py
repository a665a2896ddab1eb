"""Benchmarks and demonstrations; not installed. Each file runs as `python -m bench.X`."""
