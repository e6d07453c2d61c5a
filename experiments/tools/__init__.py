"""Commands beside ``run.py``; they may use everything, and nothing uses them."""
