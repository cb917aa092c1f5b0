"""Benchmarks, baselines and recorded results."""
