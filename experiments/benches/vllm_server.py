"""A vLLM server on loopback: started or found, asked, counted."""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from experiments.settings.config import ConfigError

# Seconds that a start may take: weights are loaded, kernels compiled, memory profiled.
START = 1800
# Of the server's log, what an error shows.
NUM_LOG_CHARACTERS = 3000
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Answer:
    """What came back of one request.

    Attributes:
        text: the completion.
        first_token: seconds from sending to the first token.
        total: seconds from sending to the last.
        num_tokens: of the completion.
    """

    text: str
    first_token: float
    total: float
    num_tokens: int


class VllmServer:
    """A server that answers.

    Args:
        url: where, such as http://127.0.0.1:8000.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ConfigError(f"bench.url={url}: expected such as http://127.0.0.1:8000")
        self._address = (parts.hostname, parts.port or 80)

    def is_up(self) -> bool:
        """Whether it answers."""
        try:
            return self._get("/health", seconds=5)[0] == 200
        except OSError:
            return False

    def model(self) -> str:
        """The name of the model that it serves."""
        name: str = json.loads(self._get("/v1/models")[1])["data"][0]["id"]
        return name

    def tiles(self) -> tuple[float, float]:
        """Attention tiles that pbs computed, and that dense attention would have computed."""
        found = {"pbs:tiles_total": 0.0, "pbs:causal_tiles_total": 0.0}
        for line in self._get("/metrics")[1].splitlines():
            name = line.partition("{")[0]
            if name in found:
                found[name] += float(line.rsplit(" ", 1)[1])
        return found["pbs:tiles_total"], found["pbs:causal_tiles_total"]

    def complete(self, model: str, ids: Sequence[int], *, max_tokens: int) -> Answer:
        """A greedy completion of token ids, timed as it streams in.

        Raises:
            RuntimeError: the server refuses, or its stream ends without a token.
        """
        body = {
            "model": model,
            "prompt": list(ids),
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
        }
        connection = http.client.HTTPConnection(*self._address, timeout=START)
        started = time.perf_counter()
        text, first, count = "", None, 0
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise RuntimeError(f"the server says {answer.status}: {answer.read()[:500]!r}")
            for line in answer:
                data = line.decode().strip().removeprefix("data: ")
                if not data or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise RuntimeError(f"the server says {event['error']}")
                text += event["choices"][0]["text"]
                count += 1
                first = first or time.perf_counter() - started
        finally:
            connection.close()
        if first is None:
            raise RuntimeError("the server's stream ended without a token")
        return Answer(text, first, time.perf_counter() - started, count)

    def _get(self, path: str, *, seconds: float = 60) -> tuple[int, str]:
        connection = http.client.HTTPConnection(*self._address, timeout=seconds)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()


def command(
    python: str,
    model: str,
    port: int,
    *,
    settings: Mapping[str, Any] | None,
    backend: str | None,
    options: Mapping[str, Any],
) -> list[str]:
    """The command line of a server.

    Args:
        python: of an environment with vLLM and this project.
        model: a folder, or a name on the hub.
        port: on loopback.
        settings: of the plug-in; None for vLLM as it is.
        backend: vLLM's attention backend; None leaves the choice to it.
        options: further ones, without dashes; true is a flag.
    """
    words = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    words += ["--host", "127.0.0.1", "--port", str(port)]
    if settings is not None:
        words += ["--additional-config", json.dumps({"pbs": dict(settings)})]
    if backend is not None:
        words += ["--attention-backend", backend]
    for name, value in options.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return words


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


def _end_with_parent() -> None:
    """In a new process: it gets SIGTERM when its parent dies, by whatever signal. Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def started(words: Sequence[str], port: int, log: Path) -> Iterator[VllmServer]:
    """A server as long as the context lasts.

    Raises:
        RuntimeError: it ends before it answers, or does not answer in time; with the end of its
            log, which stays beside the results.
    """
    server = VllmServer(f"http://127.0.0.1:{port}")
    with log.open("w") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=file, start_new_session=True, preexec_fn=_end_with_parent
        )
    try:
        deadline = time.monotonic() + START
        while not server.is_up():
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-NUM_LOG_CHARACTERS:]
                raise RuntimeError(f"vLLM did not start; the end of {log}:\n{tail}")
            time.sleep(1)
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
