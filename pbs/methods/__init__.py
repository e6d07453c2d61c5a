"""Attention methods: what to compute. Baselines register here and live in ``baselines/``."""

from pbs.methods.base import AttentionMethod, CallRecord, Knob
from pbs.methods.build import build_method
from pbs.methods.names import METHODS

__all__ = ["METHODS", "AttentionMethod", "CallRecord", "Knob", "build_method"]
