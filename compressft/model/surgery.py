"""Changes to a model's modules in place: replace, compress, freeze, put adapters in."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from compressft.model.anatomy import Layer, anatomy
from compressft.modules.bottleneck import AdaptedNorm, AdaptedOutput, on_top
from compressft.modules.linear import CompressedLinear
from compressft.modules.pretrained import pretrained


def pfeiffer_path(layer: Layer) -> str:
    """Model-level path of what holds a layer's adapter in Pfeiffer's place, as its attribute `adapter`."""
    return f"{layer.name}.{layer.family.ffn_norm or layer.family.ffn_out}"


def put_after_ffn(model: nn.Module, layer: Layer, adapter: nn.Module) -> None:
    """Pfeiffer's place: inside the LayerNorm after the FFN, or, in a pre-norm layer, on the FFN's output."""
    if layer.family.ffn_norm is None:
        put_after(model, layer, layer.family.ffn_out, adapter)
        return
    norm = layer.part(layer.family.ffn_norm)
    assert isinstance(norm, nn.LayerNorm)
    replace(model, pfeiffer_path(layer), AdaptedNorm.of(norm, on_top(getattr(norm, "adapter", None), adapter)))


def put_after(model: nn.Module, layer: Layer, path: str, adapter: nn.Module) -> None:
    """On the output of the module at a layer-relative path; on top of an adapter that is there."""
    if path in layer.linears:
        linear = compress_linear(model, f"{layer.name}.{path}")
        linear.adapter = on_top(linear.adapter, adapter)
        return
    module = layer.part(path)
    if isinstance(module, AdaptedOutput):
        module.adapter = on_top(module.adapter, adapter)
    else:
        replace(model, f"{layer.name}.{path}", AdaptedOutput(module, adapter))


def adapter_in(model: nn.Module, layer: Layer) -> nn.Module | None:
    """What stands in Pfeiffer's place of a layer, None where nothing does."""
    return getattr(model.get_submodule(pfeiffer_path(layer)), "adapter", None)


def replace(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` where the module at `path` is."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def take_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let `new`, which takes the place of `old`, call what was called before and after its forward."""
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        setattr(new, name, getattr(old, name))
        setattr(new, f"{name}_with_kwargs", getattr(old, f"{name}_with_kwargs"))


def compress_linear(model: nn.Module, path: str) -> CompressedLinear:
    """Make the layer at `path` a CompressedLinear (it stays one if it is) and return it."""
    new = CompressedLinear.of(model.get_submodule(path))
    replace(model, path, new)
    return new


def restore_plain(model: nn.Module) -> None:
    """Turn every CompressedLinear whose slots are empty back into the plain layer it came from."""
    for path, module in list(model.named_modules()):
        if isinstance(module, CompressedLinear):
            replace(model, path, module.restore())


def freeze(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Freeze all parameters, or those below the given module paths."""
    roots = [model] if names is None else [model.get_submodule(name) for name in names]
    for root in roots:
        root.requires_grad_(False)


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute activations in the backward pass instead of keeping them."""
    owner = pretrained(model)
    # transformers renamed it in 5.23.
    enable = getattr(owner, "activation_checkpointing_enable", None) or owner.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # It also lets the embeddings' output want a gradient, which reentrant checkpointing needs: the backward pass would
    # go through all that is frozen.
    owner.disable_input_require_grads()


def head_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters outside the backbone, plus its pooler: what a new task always trains.

    A language model has none: its output layer is pretrained, tied to the embeddings or not.
    """
    parts = anatomy(model)
    if not parts.prefix or pretrained(model).get_output_embeddings() is not None:
        return []
    pooler = parts.path(parts.family.pooler) + "." if parts.family.pooler else None
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if not name.startswith(parts.prefix + ".") or (pooler and name.startswith(pooler))
    ]
