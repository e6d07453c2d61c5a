"""``python run.py ...`` in processes that start in milliseconds, to be killed by the dozen.

A server imports everything once and computes nothing; every command is a fork of it, which runs
``run.py`` as Python would. Killing a command is killing a process of its own.
"""

import atexit
import contextlib
import importlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What commands import on their way; a module that is missing here costs time only. W&B makes a
# folder when it is imported and removes it when Python ends, so every process needs its own.
BASE = (
    *(
        "experiments.run.cli",
        "experiments.run.runner",
        "experiments.run.summary",
        "experiments.benches.needle",
    ),
    *(
        "experiments.timing.attention_timing",
        "experiments.timing.prefill_timing",
        "experiments.timing.dense_kernels",
    ),
    *(
        "experiments.report.pictures",
        "matplotlib.pyplot",
        "PIL.PngImagePlugin",
        "rich._emoji_codes",
    ),
    *("transformers.models.llama.modeling_llama", "transformers.processing_utils"),
    *("transformers.tokenization_python", "requests"),
)
OPENCOMPASS = ("experiments.benches.opencompass.harness", "experiments.benches.opencompass.model")


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: exit status; -9 if it was killed.
        seconds: from its start.
        ticks: moments at which it could have been killed, None if it was.
        printed: stdout and stderr.
    """

    status: int
    seconds: float
    ticks: int | None
    printed: str


def wait_for(is_so, *, seconds=120):
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


class Command:
    """One started command."""

    def __init__(self, server, pid, log):
        self._server, self.pid, self._log = server, pid, log
        self._started = time.monotonic()

    @property
    def printed(self):
        return self._log.read_text(errors="replace")

    def wait(self, *, kill_after=None):
        """Wait for the end; kill -9 after so many seconds."""
        deadline = None if kill_after is None else self._started + kill_after
        while True:
            reply = self._server.ask(op="poll", pid=self.pid)
            if reply["status"] is not None:
                break
            if deadline is not None and time.monotonic() >= deadline:
                os.kill(self.pid, signal.SIGKILL)
                deadline = None
            time.sleep(0.005)
        seconds = time.monotonic() - self._started
        ticks = re.search(r"^ticks (\d+)$", self.printed, re.MULTILINE)
        return Ended(reply["status"], seconds, int(ticks[1]) if ticks else None, self.printed)


class Server:
    """Forks commands. A context manager; commands that are still there at its end are killed."""

    def __enter__(self):
        words = [sys.executable, "-m", "tests.reliability.commands"]
        # Where W&B ran in this process it left the address of its service in the environment, and
        # commands would talk to that one, which outlives them.
        env = {name: value for name, value in os.environ.items() if "WANDB_SERVICE" not in name}
        env |= {"OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
        self._process = subprocess.Popen(
            words, cwd=ROOT, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._commands, self._num = [], 0
        self.ask(op="load", modules=BASE)
        return self

    def __exit__(self, *_):
        self._process.stdin.close()  # ends the server, which kills what is left
        self._process.wait()
        self._process.stdout.close()

    def ask(self, **request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply = self._process.stdout.readline()
        if not reply:
            raise RuntimeError("the server of commands has ended; its error is above")
        return json.loads(reply)

    def load(self, modules):
        """Import these once, for all later commands."""
        self.ask(op="load", modules=modules)

    def start(self, *words, folder, kill_at=None):
        """Begin ``python run.py words`` in ``folder``, to be killed at its moment ``kill_at``."""
        self._num += 1
        log = Path(folder, f"command{self._num}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        reply = self.ask(op="start", words=words, folder=str(folder), log=str(log), at=kill_at)
        return Command(self, reply["pid"], log)

    def run(self, *words, folder, kill_at=None, kill_after=None):
        return self.start(*words, folder=folder, kill_at=kill_at).wait(kill_after=kill_after)


class _Ticks:
    """Counts the moments at which files change, and kills this process at one of them.

    Which one says ``at``: its number, or a part of the path of the file that is about to change.

    A moment lies before every opening for writing, renaming, removing, making and locking of a file
    below ``folder``, in the middle of every line of samples, and after it.
    """

    EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "fcntl.flock")

    def __init__(self, folder, at):
        self._folder, self._at, self.count = folder, at, 0

    def install(self):
        from experiments.files import to_json
        from experiments.store import Appender

        sys.addaudithook(self._hear)
        real = Appender.append

        def append(appender, record):
            line = to_json(record).encode()
            self._tick(
                lambda: (appender._file.write(line[: len(line) // 2]), appender._file.flush())
            )
            real(appender, record)
            self._tick()

        Appender.append = append

    def _hear(self, event, args):
        if event not in self.EVENTS:
            return
        if event == "open":
            is_written = isinstance(args[1], str) and set(args[1]) & set("wax+")
            if not is_written and not (args[1] is None and args[2] & (os.O_WRONLY | os.O_RDWR)):
                return
        path = os.path.abspath(str(args[0]))
        if event == "fcntl.flock" or path.startswith(self._folder):
            self._tick(is_named=isinstance(self._at, str) and self._at in path)

    def _tick(self, last_words=lambda: None, *, is_named=False):
        if is_named or self.count == self._at:
            last_words()
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


def _become(request):
    """Run the command in this process, and end it."""
    folder = request["folder"]
    os.chdir(folder)
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [str(ROOT / "run.py"), *request["words"]]
    ticks = _Ticks(folder, request["at"])
    ticks.install()
    status = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    print(f"ticks {ticks.count}")
    atexit._run_exitfuncs()  # which os._exit leaves out; W&B ends its service there
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _serve():
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    running = set()
    for line in sys.stdin:
        request = json.loads(line)
        reply = {}
        if request["op"] == "load":
            for name in request["modules"]:
                importlib.import_module(name)
        elif request["op"] == "start":
            pid = os.fork()
            if pid == 0:
                try:
                    _become(request)
                finally:
                    os._exit(70)
            running.add(pid)
            reply = {"pid": pid}
        else:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            running.discard(pid)
            reply = {"status": os.waitstatus_to_exitcode(status) if pid else None}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _warm_up():
    """Find Hydra's plug-ins and the settings of all methods and benches once."""
    import torch
    from hydra.core.plugins import Plugins

    from experiments.run.cli import register_configs

    torch.set_num_threads(1)
    Plugins.instance()
    register_configs()


if __name__ == "__main__":
    _warm_up()
    _serve()
