"""Attention maps of a run: ``python -m experiments.tools.attention_gallery RUN_FOLDER``.

Draws layers and heads that the run itself did not, of any run whose model can be loaded, and sends
them to the run's W&B entry as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.report.galleries import NUM_TOKENS, draw_galleries
from experiments.settings.config import ConfigError


def main(words: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    arguments = _parse(words)
    folder = Path(arguments.run)
    if not (folder / "config.yaml").is_file():
        sys.stderr.write(f"{folder} is no folder of a run: expected a config.yaml in it\n")
        return 1
    from experiments.models.load import load_model
    from experiments.report.compare import config_of
    from experiments.run.tracking import Tracker
    from experiments.settings.names import describe

    cfg = config_of(folder)
    try:
        pictures = draw_galleries(
            cfg,
            load_model(cfg.model),
            folder,
            layers=arguments.layers,
            heads=arguments.heads,
            num_tokens=arguments.tokens,
        )
    except (ConfigError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    tracker = Tracker(cfg.logger, cfg.paths)
    tracker.start(
        cfg.hash,
        name=describe(cfg.method),
        group=f"{cfg.bench['name']}/{cfg.model_name}",
        kind="cell",
        config=cfg.to_dict(),
    )
    tracker.finish({}, pictures=pictures)
    for picture in pictures:
        sys.stdout.write(f"picture: {picture}\n")
    if not pictures:
        sys.stdout.write(f"{describe(cfg.method)} computes everything here: no maps to draw\n")
    return 0


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tools.attention_gallery",
        description="Attention maps of a run's method, before and after the permutation.",
    )
    parser.add_argument("run", help="folder of a run: <outputs>/<bench>/<model>/<method>/<hash>")
    parser.add_argument("--layers", type=_numbers, help="such as 0,3,5; default: a few, spread")
    parser.add_argument("--heads", type=_numbers, help="query heads; default: most to least helped")
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS, help="length of the prompt")
    return parser.parse_args(words)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
