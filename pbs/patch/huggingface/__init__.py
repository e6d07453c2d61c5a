"""The plug-in into transformers; importing it registers the attention implementation "pbs".

``from_pretrained(..., attn_implementation="pbs")`` then runs the default PBS method;
:func:`apply_patch_with_prefill` runs any method and counts what it did. This package is the only
part of ``pbs`` that knows transformers.
"""

try:
    from transformers import AttentionInterface, AttentionMaskInterface
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        "patching a model needs transformers, which is not installed: pip install 'pbs-attn[hf]'"
    ) from error

from pbs.methods import AttentionMethod, build_method
from pbs.patch.huggingface.attention import attention_forward
from pbs.patch.huggingface.masks import PaddingMask, padding_mask
from pbs.patch.huggingface.patch import (
    IMPLEMENTATION,
    Patch,
    apply_patch_with_prefill,
    get_patch,
    remove_patch,
)
from pbs.patch.huggingface.report import LayerReport, PatchReport

__all__ = [
    "IMPLEMENTATION",
    "LayerReport",
    "PaddingMask",
    "Patch",
    "PatchReport",
    "apply_patch_with_prefill",
    "attention_forward",
    "get_flashattn_prefill",
    "get_flexprefill_prefill",
    "get_meanpooling_prefill",
    "get_minference_prefill",
    "get_patch",
    "get_permuted_block_sparse_attn_fwd",
    "get_xattention_prefill",
    "padding_mask",
    "remove_patch",
]

AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, padding_mask)


def get_permuted_block_sparse_attn_fwd(**params: object) -> AttentionMethod:
    """PBS-Attn; parameters as in :class:`pbs.methods.pbs.PBS`."""
    return build_method("pbs", **params)


def get_flashattn_prefill() -> AttentionMethod:
    """Dense attention."""
    return build_method("flash")


def get_meanpooling_prefill(**params: object) -> AttentionMethod:
    """MeanPooling; parameters as in the method "meanpool"."""
    return build_method("meanpool", **params)


def get_minference_prefill(**params: object) -> AttentionMethod:
    """MInference; parameters as in the method "minference"."""
    return build_method("minference", **params)


def get_xattention_prefill(**params: object) -> AttentionMethod:
    """XAttention; parameters as in the method "xattention"."""
    return build_method("xattention", **params)


def get_flexprefill_prefill(**params: object) -> AttentionMethod:
    """FlexPrefill; parameters as in the method "flexprefill"."""
    return build_method("flexprefill", **params)
