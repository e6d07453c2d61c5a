"""What a user sees while a run works: messages and progress, on stderr; results go to stdout."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from typing_extensions import override

from experiments.settings.credentials import hide

CONSOLE = Console(stderr=True)
SECONDS_BETWEEN_LINES = 10.0

logger = logging.getLogger(__name__)


class _ConsoleHandler(logging.Handler):
    """Writes messages above a running progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        text = hide(prefix + record.getMessage())
        CONSOLE.print(text, markup=False, highlight=False, soft_wrap=True)


def show_messages() -> None:
    """Send this project's messages to the terminal; repeated calls do nothing."""
    ours = logging.getLogger("experiments")
    ours.setLevel(logging.INFO)
    if not any(isinstance(handler, _ConsoleHandler) for handler in ours.handlers):
        ours.addHandler(_ConsoleHandler())


class _LogLines(logging.Formatter):
    """Lines of the log, tracebacks included, without keys."""

    def format(self, record: logging.LogRecord) -> str:
        return hide(super().format(record))


class _LogFile(logging.FileHandler):
    """A log that cannot be written, on a full disk, costs one message and no traceback."""

    @override
    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        logging.getLogger().removeHandler(self)
        logger.warning("%s: the log ends here: %s", self.baseFilename, error)


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Write all messages to a file as well, with times and tracebacks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(_LogLines("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        with contextlib.suppress(OSError):  # what is left in the buffer of a full disk
            handler.close()


class SampleProgress:
    """Samples done, samples a second, time left: a bar in a terminal, else a line now and then.

    Args:
        title: what is measured.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=CONSOLE,
            disable=not CONSOLE.is_terminal,
            transient=True,
        )

    def __enter__(self) -> SampleProgress:
        self._bar.start()
        self._total = self._done = self._new = 0
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, total: int, done: int) -> None:
        """Begin counting: ``done`` of ``total`` samples are there already."""
        self._total, self._done = total, done
        self._started = self._last_line = time.monotonic()
        self._task = self._bar.add_task(self._title, total=total, completed=done, rate="")
        if done:
            logger.info("%s: %d of %d samples done, continuing", self._title, done, total)
        else:
            logger.info("%s: %d samples", self._title, total)

    def advance(self) -> None:
        """One more sample."""
        self._done += 1
        self._new += 1
        now = time.monotonic()
        rate = self._new / max(now - self._started, 1e-9)
        self._bar.update(self._task, completed=self._done, rate=f"{rate:.2f} samples/s")
        if CONSOLE.is_terminal or now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        left = (self._total - self._done) / rate
        logger.info(
            "%s: %d of %d samples, %.2f samples/s, %.0f s left",
            self._title,
            self._done,
            self._total,
            rate,
            left,
        )
