"""Runs one cell, or a sweep with -m: composes the configuration and hands it to the runner."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from experiments.run.cli import explain_errors, register_configs


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def run(cfg: DictConfig) -> str:
    """Run one cell; returns its folder."""
    from experiments.run.runner import run_cell

    return str(run_cell(cfg))


def main() -> int:
    """Command line. Exit status 0: every cell finished; 1: one failed, or a wrong setting."""
    explained: list[str] = []
    if {"--help", "-h"} & set(sys.argv):
        explained = [word for word in sys.argv[1:] if "=" in word]
        sys.argv[1:] = ["--help"]  # Hydra's part of the text is the same whatever else was asked
    register_configs(with_parameters="--help" not in sys.argv, explained=explained)
    return explain_errors(run)


if __name__ == "__main__":
    sys.exit(main())
