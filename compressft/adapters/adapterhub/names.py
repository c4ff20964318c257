"""Where the `adapters` package has its modules in a model, and what their tensors are called in its files."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from compressft.errors import UserError
from compressft.model.anatomy import Layer, anatomy

# Of the families that are known on both sides: modules of a layer that hold adapters after attention and after the
# FFN, and the name of the prefix of its attention.
_INSIDE = (("attention.output", "output"), "self_prefix")
_BESIDE = (("attention_adapters", "output_adapters"), "self_prefix")
FAMILIES: dict[str, tuple[tuple[str, str], str]] = {
    "bert": _INSIDE,
    "roberta": _INSIDE,
    "xlm-roberta": _INSIDE,
    "electra": _INSIDE,
    "distilbert": (_BESIDE[0], "self"),
    "gpt2": _BESIDE,
    "llama": _BESIDE,
    "mistral": _BESIDE,
}
ADAPTER, ADAPTER_BINARY = "adapter.safetensors", "pytorch_adapter.bin"
HEAD, HEAD_BINARY, HEAD_CONFIG = "model_head.safetensors", "pytorch_model_head.bin", "head_config.json"
FUSION, FUSION_BINARY = "model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin"
FUSION_CONFIG = "adapter_fusion_config.json"
# Tensors of a bottleneck: ours -> theirs.
BOTTLENECK = {
    "down_weight": "adapter_down.0.weight",
    "down_bias": "adapter_down.0.bias",
    "up_weight": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
}
ATTENTION = {
    "query_weight": "query.weight",
    "query_bias": "query.bias",
    "key_weight": "key.weight",
    "key_bias": "key.bias",
    "value_weight": "value.weight",
}
INVERTIBLE = {f"{half}.{i}.{part}": f"{half.upper()}.{2 * i}.{part}" for half in "fg" for i in (0, 1)
              for part in ("weight", "bias")}  # fmt: skip


def known_family(model: nn.Module, who: str) -> tuple[tuple[str, str], str]:
    """The row of a model's family.

    Raises:
        UserError: `adapters` has no such family, or other modules than we know there.
    """
    kind: str = model.config.model_type  # type: ignore[union-attr, assignment]
    if kind not in FAMILIES:
        raise UserError(f"{who}: AdapterHub's folders are exchanged for {', '.join(FAMILIES)}, not for {kind!r}")
    return FAMILIES[kind]


def in_attention(layer: Layer, places: tuple[str, str], name: str) -> str:
    """Prefix of the tensors of a layer's adapter after attention."""
    return f"{layer.name}.{places[0]}.adapters.{name}."


def in_output(layer: Layer, places: tuple[str, str], name: str) -> str:
    """Prefix of the tensors of a layer's adapter after, or next to, the FFN."""
    return f"{layer.name}.{places[1]}.adapters.{name}."


def in_fusion(layer: Layer, places: tuple[str, str], name: str) -> str:
    """Prefix of the tensors of a layer's fusion."""
    return f"{layer.name}.{places[1]}.adapter_fusion_layer.{name}."


def in_prefix(model: nn.Module, key: str, name: str) -> str:
    """Prefix of the tensors of a model's prefix, which is kept once for all layers."""
    return anatomy(model).path(f"prefix_tuning.prefix_tunings.{name}.{key}.")


def in_invertible(model: nn.Module, name: str) -> str:
    """Prefix of the tensors of a model's invertible adapter."""
    return anatomy(model).path(f"invertible_adapters.{name}.")


def rooted(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that they have in this model, which may have a head that the one they came from has not.

    The package's pickled files hold a prefix once more under every layer; these copies are left out.
    """
    root = f"{model.base_model_prefix}."
    bare = {name.removeprefix(root): t for name, t in tensors.items() if ".prefix_tuning.pool." not in name}
    return {anatomy(model).path(name): tensor for name, tensor in bare.items()}


def post_norm(model: nn.Module) -> bool:
    """Whether LayerNorms come after the residual adds."""
    return anatomy(model).family.ffn_norm is not None
