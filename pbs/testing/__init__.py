"""Inputs and error budgets shared by tests, benchmarks and notebooks."""

from pbs.testing.error_budget import assert_within_budget
from pbs.testing.inputs import make_qkv

__all__ = ["assert_within_budget", "make_qkv"]
