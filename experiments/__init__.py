"""Experiments: the runner, its benches, results, statistics and pictures."""

from experiments.openmp import limit_spinning

limit_spinning()
