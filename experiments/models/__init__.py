"""Loading models: checkpoints, random weights, several processes."""
