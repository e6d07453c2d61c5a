"""Experiments: the runner, its benches, results, statistics and pictures."""
