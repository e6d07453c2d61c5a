"""Offline vLLM engines: ``python -m tests.serving.generate``, then a line for each.

A line is a JSON list: options of ``LLM``, the file for the answers, the file for what is said. Each
engine has a process of its own, forked from this one, which has imported vLLM; "exit STATUS" is
written when it has ended.
"""

import json
import os
import shutil
import sys
import traceback
from pathlib import Path

MODEL = Path(__file__).parents[2] / "experiments" / "tiny"
LENGTHS = (300, 1000, 3000, 5000)
ON_GPU = shutil.which("nvidia-smi") is not None
# FlashAttention has no float32.
DTYPE = "bfloat16" if ON_GPU else "float32"
TASKS = ("single", "multi_key")


def questions(lengths=LENGTHS, index=0):
    """Needle questions of the embedded model, several lengths mixed, with their token ids."""
    from transformers import AutoTokenizer

    from experiments.benches.needle_tasks import encode, make_sample

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for length in lengths:
        for task in TASKS:
            sample = make_sample(
                task, length=length, depth=0.4, index=index, seed=0, tokenizer=tokenizer
            )
            yield sample, [int(token) for token in encode(sample, tokenizer)]


def main(spec, out):
    from vllm import LLM, SamplingParams

    from experiments.benches.needle_tasks import is_correct

    options = {
        "model": str(MODEL),
        "dtype": DTYPE,
        "max_model_len": 8192,
        "kv_cache_memory_bytes": 1 << 29,
        "enforce_eager": True,
        "seed": 0,
        "worker_extension_cls": "pbs.patch.vllm.counters.WorkerExtension",
    }
    if ON_GPU:
        options["gpu_memory_utilization"] = 0.1
    if ON_GPU and "additional_config" in spec:
        options["attention_backend"] = "CUSTOM"
    llm = LLM(**options | spec)
    asked = list(questions())
    prompts = [{"prompt_token_ids": ids} for _, ids in asked]
    greedy = SamplingParams(max_tokens=8, temperature=0)
    rounds = []
    for _ in range(2):  # the second finds the cache filled
        answers = llm.generate(prompts, greedy, use_tqdm=False)
        outputs = [answer.outputs[0] for answer in answers]
        correct = [
            is_correct(sample, output.text)
            for (sample, _), output in zip(asked, outputs, strict=True)
        ]
        rounds.append(
            {
                "tokens": [list(output.token_ids) for output in outputs],
                "cached": [answer.num_cached_tokens for answer in answers],
                "correct": correct,
            }
        )
    Path(out).write_text(
        json.dumps({"rounds": rounds, "workers": llm.collective_rpc("pbs_report")})
    )


def serve():
    """An engine for each line of the standard input."""
    import vllm  # noqa: F401

    for line in sys.stdin:
        spec, out, log = json.loads(line)
        child = os.fork()
        if child == 0:
            with open(log, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            status = 1
            try:
                main(spec, out)
                status = 0
            except BaseException:  # noqa: BLE001 - the status says it
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        print(f"exit {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    serve()
