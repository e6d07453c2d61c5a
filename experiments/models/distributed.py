"""One model over several processes (``torchrun``, ``model.tp=true``): who writes, who follows.

All processes run the same command and do the same work; only the first writes results.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from tempfile import TemporaryDirectory

from experiments.settings.config import ConfigError, PathsConfig, RunConfig
from experiments.settings.ranks import is_follower, num_ranks


def check_tensor_parallel(is_wanted: bool) -> None:
    """Check that the command was started the way ``model.tp`` asks for.

    Raises:
        ConfigError: model.tp=true without torchrun, or torchrun without model.tp=true.
    """
    if is_wanted and num_ranks() < 2:
        raise ConfigError(
            "model.tp=true shards one model over several processes; start them with: "
            "torchrun --nproc_per_node=N run.py ... model.tp=true"
        )
    if not is_wanted and num_ranks() > 1:
        raise ConfigError(
            f"torchrun started {num_ranks()} processes that would all do the same; add "
            "model.tp=true to shard the model over them, or start one process with python run.py"
        )


@contextmanager
def join_ranks(cfg: RunConfig) -> Iterator[RunConfig]:
    """Run a cell together with the other processes of ``torchrun``; alone, nothing happens.

    The first process runs the cell as it is. The others do the same in a folder of their own, which
    starts with the same samples and is thrown away: all measure the same, and one writes.

    Raises:
        ConfigError: model.tp=true without torchrun, or torchrun without model.tp=true.
    """
    check_tensor_parallel(cfg.model.tp)
    if not cfg.model.tp:
        yield cfg
        return
    import torch.distributed as dist

    _start_process_group(cfg.model.device)
    dist.barrier()
    if not is_follower():
        dist.barrier()  # the others have copied what there is
        yield cfg
        return
    logging.getLogger("experiments").setLevel(logging.CRITICAL)
    with TemporaryDirectory() as scratch:
        own = replace(
            cfg,
            paths=PathsConfig(outputs=scratch, wandb=scratch),
            logger=replace(cfg.logger, mode="disabled"),
        )
        if cfg.folder.is_dir():
            shutil.copytree(cfg.folder, own.folder)
        dist.barrier()
        yield own


def _start_process_group(device: str) -> None:
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    is_cuda = device != "cpu" and torch.cuda.is_available()
    if is_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if is_cuda else "gloo")
