"""A plug-in for vLLM: prompts are prefilled sparsely, everything else stays vLLM's.

    vllm serve MODEL --attention-backend CUSTOM --additional-config.pbs.method pbs

Without ``additional_config["pbs"]`` and without that backend, nothing changes. docs/serving.md says
what is supported and what to watch.
"""

from __future__ import annotations


def register() -> None:
    """Entry point of vLLM's group ``vllm.general_plugins``, called once in each of its processes.

    Names backends and imports none: what a platform does not use is never loaded. On a CPU vLLM has
    one attention backend whatever is asked for, so that one is replaced; without settings the
    replacement is the backend itself.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from pbs.patch.vllm.metrics import publish
    from pbs.patch.vllm.watch import watch

    register_backend(AttentionBackendEnum.CPU_ATTN, "pbs.patch.vllm.cpu.SparseCPUBackend")
    register_backend(AttentionBackendEnum.CUSTOM, "pbs.patch.vllm.cuda.SparseFlashBackend")
    watch()
    publish()
