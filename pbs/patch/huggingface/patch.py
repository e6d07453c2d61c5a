"""Put a method into a model, and take it out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pbs.methods import AttentionMethod
from pbs.patch.huggingface.attention import (
    LAYER_ATTRIBUTE,
    LOADED_ATTRIBUTE,
    PatchedLayer,
    loaded_layer,
)
from pbs.patch.huggingface.generation import after_prefill
from pbs.patch.huggingface.report import LayerCounter, PatchReport
from pbs.patch.huggingface.support import find_attention_layers

IMPLEMENTATION = "pbs"
_PATCH_ATTRIBUTE = "_pbs_patch"


class Patch:
    """The handle of a patched model.

    Attributes:
        method: what the layers run in prefill.
        skip_layers: layers that stay dense, ascending.
    """

    def __init__(
        self,
        method: AttentionMethod,
        skip_layers: tuple[int, ...],
        modules: list[nn.Module],
        configs: list[tuple[Any, str | None]],
        model_class: type,
    ) -> None:
        self.method = method
        self.skip_layers = skip_layers
        self._modules = modules
        self._configs = configs
        self._model_class = model_class
        self._counters: dict[int, LayerCounter] = {}
        self.reset()

    def report(self) -> PatchReport:
        """What ran sparse and what ran dense since the patch was applied or reset."""
        counters = sorted(self._counters.items())
        return PatchReport([counter.report() for _, counter in counters])

    def reset(self) -> None:
        """Start counting anew."""
        self._counters.clear()
        for module in self._modules:
            index = int(module.layer_idx)  # type: ignore[arg-type]
            counter = self._counters.setdefault(index, LayerCounter(index))
            layer = PatchedLayer(self.method, counter, is_skipped=index in self.skip_layers)
            setattr(module, LAYER_ATTRIBUTE, layer)

    def undo(self, model: PreTrainedModel) -> None:
        """Give the model back what it had; see :func:`remove_patch`."""
        for module in self._modules:
            delattr(module, LAYER_ATTRIBUTE)
        # Parents stand before their parts: setting a config's attention sets that of its parts.
        for config, implementation in self._configs:
            config._attn_implementation = implementation
        delattr(model, _PATCH_ATTRIBUTE)
        model.__class__ = self._model_class


class LoadedPatch(Patch):
    """The handle of a model that was loaded with ``attn_implementation="pbs"``: nothing to undo."""

    def __init__(self, model: PreTrainedModel) -> None:
        modules = list(find_attention_layers(model).values())
        self.method = loaded_layer(modules[0]).method
        self.skip_layers = ()
        self._modules = modules

    def report(self) -> PatchReport:
        """What ran sparse and what ran dense since the model was loaded, or reset."""
        counters = [loaded_layer(module).counter for module in self._modules]
        ordered = sorted(counters, key=lambda counter: counter.layer_idx)
        return PatchReport([counter.report() for counter in ordered])

    def reset(self) -> None:
        """Start counting anew."""
        for module in self._modules:
            if hasattr(module, LOADED_ATTRIBUTE):
                delattr(module, LOADED_ATTRIBUTE)

    def undo(self, model: PreTrainedModel) -> None:
        """Refused.

        Raises:
            ValueError: always; what the model had before is not known.
        """
        raise ValueError(
            f"{type(model).__name__} was loaded with attn_implementation='pbs', not patched; "
            "model.set_attn_implementation('sdpa') gives it another attention"
        )


def apply_patch_with_prefill(
    model: PreTrainedModel,
    prefill_fn: AttentionMethod,
    skip_layers: Iterable[int] | None = None,
    *,
    replace: bool = False,
) -> PreTrainedModel:
    """Let a causal language model run an attention method in prefill.

    Decoding steps stay dense, and so do layers that ask for more than causal attention (sliding
    windows, soft caps, sinks); :func:`get_patch` tells what ran how. A decoding step is a call with
    fewer new tokens than ``prefill_fn.decode_below`` on a filled cache: single tokens, the tokens
    of an assistant model or a prompt look-up, which ``generate`` then lets begin after the prefill
    (so that the tokens are those without them), short follow-ups, and the last part of a prefill
    in chunks if it is that short. The model can be used as a context manager, which removes the
    patch at the end::

        with apply_patch_with_prefill(model, build_method("pbs")) as model:
            model.generate(**inputs)

    Threads may share it. A copy (``copy.deepcopy``, pickle, ``torch.save``, a spawned process) is
    patched on its own, with a copy of the method and of the counts.

    Args:
        model: a transformers model whose attention goes through the attention registry.
        prefill_fn: the method, from :func:`pbs.build_method`.
        skip_layers: indices of layers that stay dense.
        replace: take out the patch that the model has, if any, with its counts: a cell of a
            notebook can then run twice.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` or ``prefill_fn`` of a wrong type.
        ValueError: already patched, without ``replace``; ``skip_layers`` names a layer the model
            does not have, or the method's settings are for a model with other layers or heads.
        NotImplementedError: the model's attention cannot be replaced; nothing was changed.
    """
    if not isinstance(prefill_fn, AttentionMethod):
        raise TypeError(
            f"expected an AttentionMethod as prefill_fn, got {_type_name(prefill_fn)}; make one "
            "with pbs.build_method(name, ...) or get_permuted_block_sparse_attn_fwd(...), or wrap "
            "your function in a subclass of pbs.AttentionMethod that overrides plan()"
        )
    layers = find_attention_layers(model)
    if replace and hasattr(model, _PATCH_ATTRIBUTE):
        remove_patch(model)
    prefill_fn.check_model(**_sizes_of(model))
    if hasattr(model, _PATCH_ATTRIBUTE) or any(
        hasattr(module, LAYER_ATTRIBUTE) for module in layers.values()
    ):
        raise ValueError(
            f"{type(model).__name__} is already patched; call remove_patch(model) on the model "
            "that was patched first, or patch that with replace=True"
        )
    modules = list(layers.values())
    skipped = _check_skip_layers(skip_layers, {int(m.layer_idx) for m in modules})  # type: ignore[arg-type]
    configs = [(config, config._attn_implementation) for config in _configs_of(model)]
    model.set_attn_implementation(IMPLEMENTATION)
    for name, module in layers.items():
        config = getattr(module, "config", model.config)
        if config._attn_implementation != IMPLEMENTATION:
            for other, implementation in configs:
                other._attn_implementation = implementation
            raise NotImplementedError(
                f"transformers did not accept another attention for {name} "
                f"({type(module).__name__}) of {type(model).__name__}; nothing was changed"
            )
    patch = Patch(prefill_fn, skipped, modules, configs, type(model))
    setattr(model, _PATCH_ATTRIBUTE, patch)
    model.__class__ = _patched_class(type(model))
    return model


def remove_patch(model: PreTrainedModel) -> PreTrainedModel:
    """Undo :func:`apply_patch_with_prefill`: attention implementation, class, everything.

    Returns:
        The same model.

    Raises:
        ValueError: the model is not patched.
    """
    get_patch(model).undo(model)
    return model


def get_patch(model: PreTrainedModel) -> Patch:
    """The handle of a patched model, or of one loaded with ``attn_implementation="pbs"``.

    Raises:
        ValueError: the model is not patched.
    """
    patch = getattr(model, _PATCH_ATTRIBUTE, None)
    if patch is None and _was_loaded(model):
        return LoadedPatch(model)
    if not isinstance(patch, Patch):
        raise ValueError(
            f"{type(model).__name__} is not patched; call apply_patch_with_prefill(model, method)"
        )
    return patch


def _was_loaded(model: PreTrainedModel) -> bool:
    """Whether it runs this package's attention without a patch of it or of a larger model."""
    is_patched = any(hasattr(module, LAYER_ATTRIBUTE) for module in model.modules())
    config = getattr(model, "config", None)
    return getattr(config, "_attn_implementation", None) == IMPLEMENTATION and not is_patched


def _patched_class(model_class: Any) -> type:
    """A subclass for ``with`` and pickle, whose prefill no assistant changes.

    ``with`` and pickle look on the class, not on the model. Name and module are the original's, so
    that save_pretrained writes the right architecture.
    """

    def enter(self: PreTrainedModel) -> PreTrainedModel:
        return self

    def leave(self: PreTrainedModel, *_exception: object) -> None:
        remove_patch(self)

    def reduce(self: PreTrainedModel, protocol: int) -> tuple[Any, ...]:
        build, arguments, *state = model_class.__reduce_ex__(self, max(protocol, 2))
        own = tuple(model_class if item is type(self) else item for item in arguments)
        return _build_patched, (model_class, build, own), *state

    def get_candidate_generator(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return after_prefill(model_class._get_candidate_generator(self, *args, **kwargs))

    return type(
        model_class.__name__,
        (model_class,),
        {
            "__enter__": enter,
            "__exit__": leave,
            "__reduce_ex__": reduce,
            "__module__": model_class.__module__,
            "__qualname__": model_class.__qualname__,
            "__doc__": model_class.__doc__,
            "_get_candidate_generator": get_candidate_generator,
        },
    )


def _build_patched(model_class: Any, build: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """A copy of a patched model as copy and pickle make it, before its state is set."""
    model = build(*arguments)
    model.__class__ = _patched_class(model_class)
    return model


def _sizes_of(model: PreTrainedModel) -> dict[str, Any]:
    """What a method's settings per layer and head must fit, by the model's config."""
    config = model.config.get_text_config()
    num_heads = getattr(config, "num_attention_heads", None)
    return {
        "num_layers": config.num_hidden_layers,
        "num_heads": num_heads if isinstance(num_heads, int) else None,
    }


def _configs_of(model: PreTrainedModel) -> list[Any]:
    """Every config the model's parts look at, parents before their parts, each once."""
    found: dict[int, Any] = {}
    queue = [model.config]
    queue += [m.config for m in model.modules() if hasattr(m, "config")]
    while queue:
        config = queue.pop(0)
        if config is None or id(config) in found or not hasattr(config, "_attn_implementation"):
            continue
        found[id(config)] = config
        queue += [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return list(found.values())


def _check_skip_layers(skip_layers: Iterable[int] | None, existing: set[int]) -> tuple[int, ...]:
    if skip_layers is None:
        return ()
    if isinstance(skip_layers, str | bytes) or not isinstance(skip_layers, Iterable):
        raise TypeError(f"expected skip_layers as layer indices, got {skip_layers!r}; try [0, 1]")
    skipped = list(skip_layers)
    for index in skipped:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"skip_layers must hold integers, got {index!r}")
        if index not in existing:
            raise ValueError(
                f"skip_layers names layer {index}, but the model's attention layers are "
                f"{_as_ranges(existing)}"
            )
    return tuple(sorted(set(skipped)))


def _as_ranges(indices: set[int]) -> str:
    ordered = sorted(indices)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered))


def _type_name(value: object) -> str:
    if callable(value) and not isinstance(value, type):
        return f"the callable {getattr(value, '__name__', type(value).__name__)}"
    return repr(value) if isinstance(value, str) else type(value).__name__
