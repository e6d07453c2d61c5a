"""The embedded model, its data and its training."""
