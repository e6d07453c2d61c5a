"""``bench=serving`` against a stand-in for a server; a real one: ``make test-vllm``."""

import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest
from transformers import AutoTokenizer

from experiments.benches.needle_tasks import encode, make_sample
from experiments.benches.serving import ServingBench
from experiments.benches.vllm_server import VllmServer, free_port, started
from experiments.benches.vllm_server import command as command_line
from experiments.results import load
from experiments.settings.config import ROOT, ConfigError

SERVE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Handler(BaseHTTPRequestHandler):
    """Answers the questions that it knows; each request computes 30 of 100 tiles."""

    answers, computes, requests = {}, True, 0

    def log_message(self, *args):
        pass

    def reply(self, text, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        done = Handler.requests if self.computes else 0
        pages = {
            "/health": "",
            "/v1/models": json.dumps({"data": [{"id": "tiny"}]}),
            "/metrics": "# HELP pbs:tiles_total\n"
            f'pbs:tiles_total{{worker="1",layer="0"}} {30.0 * done}\n'
            f'pbs:causal_tiles_total{{worker="1",layer="0"}} {100.0 * done}\n',
        }
        self.reply(pages[self.path])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["stream"] is True
        assert body["temperature"] == 0
        Handler.requests += 1
        words = self.answers.get(tuple(body["prompt"]), "?").split()
        events = [json.dumps({"choices": [{"text": f"{word} "}]}) for word in words]
        self.reply("".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]))


@pytest.fixture
def url(monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "experiments/tiny")
    sample = make_sample("single", length=512, depth=1.0, index=0, seed=0, tokenizer=tokenizer)
    known = {tuple(int(token) for token in encode(sample, tokenizer)): sample.answers[0]}
    monkeypatch.setattr(Handler, "answers", known)
    monkeypatch.setattr(Handler, "requests", 0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


WORDS = ("bench=serving", "debug=fast", "paths.outputs=out")


def test_a_run_records_times_density_and_answers(command, tmp_path, url):
    status, printed = command("method=pbs", f"bench.url={url}", "bench.rate=50", *WORDS)
    assert status == 0, printed
    (row,) = load(tmp_path / "out").to_dict("records")
    assert row["length"] == 512
    assert row["density"] == pytest.approx(0.3)
    assert row["accuracy"] == 0.5
    assert 0 < row["prefill_seconds"] < 10
    (path,) = (tmp_path / "out").rglob("metrics.json")
    total = json.loads(path.read_text())["results"]["total"]
    assert total["tokens_per_second"] > 0
    assert total["first_token_p99"] >= row["prefill_seconds"]


def test_drawn_weights_have_times_and_no_answers(command, tmp_path, url):
    status, printed = command("method=pbs", "model.weights=random", f"bench.url={url}", *WORDS)
    assert status == 0, printed
    (row,) = load(tmp_path / "out").to_dict("records")
    assert row["density"] == pytest.approx(0.3)
    assert pd.isna(row["accuracy"])
    assert row["prefill_seconds"] > 0


def test_a_server_that_leaves_prompts_to_vllm_is_an_error(command, url, monkeypatch):
    monkeypatch.setattr(Handler, "computes", False)
    status, printed = command("method=pbs", f"bench.url={url}", *WORDS)
    assert status != 0
    assert "computed no prompt by pbs" in printed
    assert command("method=flash", f"bench.url={url}", *WORDS)[0] == 0


def test_no_server_and_no_vllm_are_said_before_anything_is_done(command):
    status, printed = command("method=pbs", "bench.url=http://127.0.0.1:9", *WORDS)
    assert status != 0
    assert "no server answers there" in printed
    status, printed = command("method=pbs", "bench.python=nowhere/python", *WORDS)
    assert status != 0
    assert "make test-vllm" in printed
    with pytest.raises(ConfigError, match="http://127"):
        VllmServer("localhost:8000")
    with pytest.raises(ValueError, match=r"bench\.rate"):
        ServingBench(rate=0)


def test_what_is_started_and_what_is_said_when_it_does_not_start(tmp_path):
    words = command_line(
        "python",
        "models/x",
        8001,
        settings={"method": "pbs", "threshold": 0.9},
        backend="CUSTOM",
        options={"max_model_len": 8192, "enforce_eager": True},
    )
    asked = words[words.index("--additional-config") + 1]
    assert json.loads(asked) == {"pbs": {"method": "pbs", "threshold": 0.9}}
    assert words[-4:] == ["CUSTOM", "--max-model-len", "8192", "--enforce-eager"]
    fails = ["python3", "-c", "print('no such model'); raise SystemExit(1)"]
    with pytest.raises(RuntimeError, match="no such model"), started(fails, 9, tmp_path / "log"):
        pass


def test_a_server_ends_with_a_killed_run(tmp_path):
    port = free_port()
    serve = [sys.executable, "-c", SERVE, str(port)]
    script = f"""
import pathlib, time
from experiments.benches.vllm_server import started
with started({serve!r}, {port}, pathlib.Path({str(tmp_path / "log")!r})):
    print("up", flush=True)
    time.sleep(60)
"""
    run = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert run.stdout.readline() == "up\n"
    run.kill()
    run.wait()
    server = VllmServer(f"http://127.0.0.1:{port}")
    deadline = time.monotonic() + 10
    while server.is_up():
        assert time.monotonic() < deadline
        time.sleep(0.1)
