"""Benches that OpenCompass evaluates: its prompts, inference loop, post-processing and metrics.

Nothing here imports OpenCompass at import time but :mod:`.model`, :mod:`.loaders` and
:mod:`.harness`, which a run loads when it starts (about 10 s).
"""
