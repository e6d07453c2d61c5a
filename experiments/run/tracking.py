"""Mirrors runs to Weights & Biases. Results are on disk first: a failure here costs a warning."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import Any

from experiments.settings.config import LoggerConfig, PathsConfig

logger = logging.getLogger(__name__)


class Tracker:
    """One W&B run; every method may be called whatever happened before.

    Args:
        config: mode, project, entity.
        paths: ``paths.wandb`` is where W&B puts its own files.
    """

    def __init__(self, config: LoggerConfig, paths: PathsConfig) -> None:
        self._config = config
        self._folder = Path(paths.wandb)
        self._run: Any = None
        self._is_on = config.mode != "disabled"

    def start(
        self, run_id: str, *, name: str, group: str, kind: str, config: Mapping[str, Any]
    ) -> None:
        """Begin a W&B run, or continue the one of this id.

        Args:
            run_id: the same for the same cell, so that a resumed run continues.
            name: shown in lists.
            group: runs to be compared share it.
            kind: "cell" or "comparison".
            config: settings of the run.
        """

        def start() -> None:
            import wandb

            self._folder.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                id=run_id,
                name=name,
                group=group,
                job_type=kind,
                config=dict(config),
                project=self._config.project,
                entity=self._config.entity,
                # Absolute: W&B's service, which writes, may have started in another folder.
                dir=str(self._folder.resolve()),
                mode=self._config.mode,
                resume="allow",
                reinit="create_new",
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    x_disable_stats=True,
                    disable_git=True,
                    disable_code=True,
                    init_timeout=30,
                ),
            )
            self._run.define_metric("*", step_metric="num_done")

        self._attempt(start)

    def log_sample(self, record: Mapping[str, Any], num_done: int) -> None:
        """The numbers of one sample."""
        if self._run is None:
            return
        self._attempt(lambda: self._run.log(_numbers(record, num_done)))

    def log_earlier(self, records: Sequence[Mapping[str, Any]]) -> None:
        """The samples of earlier processes: W&B loses what it had not written when one is killed.

        Online W&B knows how many it has; offline every restart has a file of its own, with all.
        """
        if self._run is None or not records:
            return

        def log() -> None:
            num_known = self._run.step
            for num_done, record in enumerate(records, start=1):
                if num_done > num_known:
                    self._run.log(_numbers(record, num_done))

        self._attempt(log)

    def finish(
        self,
        summary: Mapping[str, Any],
        *,
        table: Sequence[Mapping[str, Any]] = (),
        pictures: Sequence[Path] = (),
        failed: bool = False,
    ) -> None:
        """Final metrics, the table and the pictures; ends the W&B run.

        Args:
            summary: final numbers.
            table: rows with equal keys.
            pictures: PNG files.
            failed: mark the run as failed.
        """
        if self._run is None:
            return

        def finish() -> None:
            import wandb

            self._run.summary.update(dict(summary))
            extras: dict[str, Any] = {path.stem: wandb.Image(str(path)) for path in pictures}
            if table:
                columns = list(table[0])
                rows = [[_cell(row.get(column)) for column in columns] for row in table]
                extras["table"] = wandb.Table(columns=columns, data=rows)
            if extras:
                self._run.log(extras)

        self._attempt(finish)
        if self._run is not None:
            self._attempt(lambda: self._run.finish(exit_code=int(failed)))
        self._run = None

    def _attempt(self, action: Callable[[], None]) -> None:
        """Do something with W&B; the first failure warns and switches tracking off."""
        if not self._is_on:
            return
        # W&B would print its own notes on every import and init.
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            action()
        except Exception as error:  # noqa: BLE001 - W&B can fail in any way; results are on disk
            self._is_on, self._run = False, None
            logger.warning(
                "tracking with W&B failed and is off for this run; results are on disk (%s: %s)",
                type(error).__name__,
                error,
            )


def _numbers(record: Mapping[str, Any], num_done: int) -> dict[str, float]:
    """What a sample's record says in numbers, and its place among all."""
    numbers = {
        f"sample/{key}": float(value) for key, value in record.items() if isinstance(value, Number)
    }
    return {**numbers, "num_done": num_done}


def _cell(value: Any) -> Any:
    """A value W&B tables take."""
    return value if value is None or isinstance(value, str | Number) else str(value)
