"""What a server is asked for: ``additional_config["pbs"]``."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from pbs.checks import check_integer
from pbs.methods import METHODS, build_method
from pbs.methods.base import AttentionMethod
from pbs.registry import unknown

KEY = "pbs"


@dataclass(frozen=True)
class ServingSettings:
    """Which method computes prompts, and which prompts and layers it computes.

    Args:
        method: of ``pbs.methods.METHODS``.
        min_keys: chunks of a prompt that see fewer tokens, its cached ones included, run dense.
        skip_layers: layers that stay dense.
        params: of the method.
    """

    method: str = "pbs"
    min_keys: int = 512
    skip_layers: tuple[int, ...] = ()
    params: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, vllm_config: Any) -> ServingSettings | None:
        """What a vLLM configuration asks for; None if nothing.

        Raises:
            ValueError: an unknown method or setting, the nearest named, or an impossible value.
        """
        given = (vllm_config.additional_config or {}).get(KEY)
        if given is None:
            backend = getattr(vllm_config.attention_config, "backend", None)
            return cls() if getattr(backend, "name", None) == "CUSTOM" else None
        if not isinstance(given, dict):
            raise ValueError(f"additional_config[{KEY!r}] must be a mapping, got {given!r}")
        return cls.parse(given)

    @classmethod
    def parse(cls, given: dict[str, Any]) -> ServingSettings:
        """Checked settings; see :meth:`of`."""
        method = given.get("method", cls.method)
        own = {entry.name for entry in fields(cls)} - {"params"}
        of_method = {entry.name for entry in fields(METHODS.load(method)) if entry.init}
        for name in given:
            if name not in own | of_method:
                raise ValueError(
                    unknown(f"setting of {KEY!r} (method {method})", name, own | of_method)
                )
        params = {name: value for name, value in given.items() if name not in own}
        settings = cls(
            method=method,
            min_keys=given.get("min_keys", cls.min_keys),
            skip_layers=_layers(given.get("skip_layers", ())),
            params=params,
        )
        check_integer(settings.min_keys, name="min_keys", smallest=0)
        settings.build()
        return settings

    def build(self) -> AttentionMethod:
        """A new method with these parameters."""
        return build_method(self.method, **self.params)


def _layers(given: Any) -> tuple[int, ...]:
    """Layer numbers from a list, or from the text that a command line gives."""
    if isinstance(given, str):
        given = [int(part) for part in given.strip("[]").split(",") if part.strip()]
    if isinstance(given, int):
        given = [given]
    layers = tuple(given)
    for layer in layers:
        check_integer(layer, name="skip_layers", smallest=0)
    return layers
