"""Attention methods: what to compute. Baselines register here and live in ``baselines/``."""

from pbs.methods.base import AttentionMethod, CallRecord
from pbs.methods.build import METHODS, build_method

__all__ = ["METHODS", "AttentionMethod", "CallRecord", "build_method"]
