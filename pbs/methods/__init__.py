"""Attention methods: what to compute. Baselines register here and live in ``baselines/``."""

from pbs.methods.base import AttentionMethod, CallRecord, Knob
from pbs.methods.build import METHODS, build_method

__all__ = ["METHODS", "AttentionMethod", "CallRecord", "Knob", "build_method"]
