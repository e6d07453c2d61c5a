"""What is measured: one file a bench, over :mod:`experiments.benches.base`."""
