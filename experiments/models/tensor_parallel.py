"""One model over several processes: which numbers of them divide it, its shards, its collectives.

Importable without hydra and wandb. The sharding is that of transformers (``DistributedConfig``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from pbs.ops.stages import stage

# Beginnings of the names under which PyTorch sends tensors between processes, or waits for them.
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "wait_")
COMMUNICATION = "communication"


def check_heads(architecture: PretrainedConfig, num_ranks: int) -> None:
    """Check that every process gets whole key/value heads, and as many as the others.

    Raises:
        ValueError: the number of processes does not divide the heads; says which do.
    """
    config = architecture.get_text_config()
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    if num_kv_heads % num_ranks == 0:
        return
    valid = [str(n) for n in range(2, num_kv_heads + 1) if num_kv_heads % n == 0]
    advice = f"start {' or '.join(valid)} (torchrun --nproc_per_node=N)"
    if not valid:
        advice = "such a model cannot be shared: leave out torchrun and model.tp"
    raise ValueError(
        f"model.tp=true shares the {num_kv_heads} key/value heads of the model evenly, and "
        f"{num_ranks} processes do not divide them; {advice}"
    )


def sharding_options() -> dict[str, Any]:
    """The option of ``from_pretrained`` that shards a model over the processes, in its words."""
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        return {"tp_plan": "auto"}
    if "tp_plan" not in inspect.signature(DistributedConfig).parameters:
        return {"tp_plan": "auto"}
    return {"distributed_config": DistributedConfig(tp_plan="auto")}


def shard_model(model: PreTrainedModel) -> PreTrainedModel:
    """This process's part of a model that lies on its device whole, as random weights do.

    The whole model stays in memory until the caller lets go of it: of the parts nothing does.
    """
    part = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        dtype=model.dtype,
        **sharding_options(),
    )
    for module in part.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = _with_own_memory(parameter)
    return part.eval()


def _with_own_memory(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """A slice of rows is a view, which would keep the whole matrix."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
    if local.untyped_storage().nbytes() == local.nbytes:
        return parameter
    own = local.clone()
    if isinstance(parameter, DTensor):
        own = DTensor.from_local(
            own,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    return torch.nn.Parameter(own, requires_grad=parameter.requires_grad)


@contextmanager
def timed_collectives() -> Iterator[None]:
    """Inside, collectives count as the stage "communication", waiting for other processes too."""
    with ExitStack() as stack:
        for module in (dist, functional):
            for name, function in _collectives(module):
                stack.enter_context(patch.object(module, name, _as_stage(function)))
        yield


def _collectives(module: ModuleType) -> list[tuple[str, Callable[..., Any]]]:
    return [
        (name, value)
        for name, value in vars(module).items()
        if name.startswith(COLLECTIVES) and inspect.isfunction(value)
    ]


def _as_stage(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def staged(*arguments: Any, **options: Any) -> Any:
        with stage(COMMUNICATION):
            return function(*arguments, **options)

    return staged
