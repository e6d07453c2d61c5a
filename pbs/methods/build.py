"""Methods by name; the table is in :mod:`pbs.methods.names`."""

from __future__ import annotations

from pbs.methods.base import AttentionMethod
from pbs.methods.names import METHODS


def build_method(name: str, **params: object) -> AttentionMethod:
    """Make an attention method.

    Args:
        name: one of ``METHODS.names``.
        **params: the method's own parameters; defaults are those of its class.

    Returns:
        The method, callable as ``method(q, k, v)``.

    Raises:
        ValueError: unknown name or parameter (the message names the nearest valid one), or a value
            outside its range.
        TypeError: a value of the wrong type.
    """
    method = METHODS.build(name, params)
    assert isinstance(method, AttentionMethod)
    return method
