"""Which arrangement of AdapterHub's a model's modules are: bottlenecks in one placement, a fusion of them, a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import nn

from compressft.adapters.adapterhub.head import fitting
from compressft.adapters.adapterhub.names import FAMILIES, post_norm
from compressft.adapters.settled import Settled, of_backbone
from compressft.methods.prefix import sites
from compressft.model.anatomy import Layer, anatomy
from compressft.model.surgery import adapter_in
from compressft.modules.attention import prefix_of
from compressft.modules.bottleneck import AdaptedNorm, AdaptedOutput, Bottleneck, BottleneckLayers, Parallel
from compressft.modules.embedding import CompressedEmbedding
from compressft.modules.fusion import AdapterFusion
from compressft.modules.invertible import INVERTIBLE, Inverse, Invertible
from compressft.modules.prefix import Prefix
from compressft.modules.pretrained import pretrained

Kind = TypeVar("Kind", bound=nn.Module)
Placement = Literal["houlsby", "pfeiffer", "parallel"]


@dataclass(frozen=True)
class Arrangement:
    """What stands in every layer.

    Attributes:
        placement: of the bottlenecks, None for a prefix; a fusion stands in Pfeiffer's place.
        bottlenecks, fusions, prefixes: what it is of, per layer from the bottom up, the others empty; two bottlenecks
            are one after attention and one after the FFN.
        invertible: the invertible adapter, None where there is none.
    """

    placement: Placement | None
    bottlenecks: tuple[tuple[BottleneckLayers, ...], ...] = ()
    fusions: tuple[AdapterFusion, ...] = ()
    prefixes: tuple[Prefix, ...] = ()
    invertible: Invertible | None = None


def held(model: nn.Module, layer: Layer, path: str) -> nn.Module | None:
    """The adapter on the output of the module at a layer-relative path, None where there is none."""
    return getattr(model.get_submodule(f"{layer.name}.{path}"), "adapter", None)


def arrangement(model: nn.Module) -> Arrangement | None:
    """The arrangement of a model's modules of ours, None where it is another one than AdapterHub's."""
    layers = anatomy(model).layers
    after = [adapter_in(model, layer) for layer in layers]
    beside = [layer.module._modules.get("parallel") for layer in layers]
    attention = [held(model, layer, layer.family.attention_out) for layer in layers]
    output = [held(model, layer, layer.family.ffn_out) for layer in layers]
    coupling: Invertible | None = getattr(anatomy(model).backbone, INVERTIBLE, None)
    if fusions := _all(after, AdapterFusion):
        return Arrangement("pfeiffer", fusions=fusions)
    if parallel := _all(beside, Parallel):
        return Arrangement("parallel", tuple((one,) for one in parallel), invertible=coupling)
    first, second = _all(attention, Bottleneck), _all(output, Bottleneck)
    if first and second:
        return Arrangement("houlsby", tuple(zip(first, second, strict=True)), invertible=coupling)
    if (found := _all(after, Bottleneck)) and not any(attention):
        return Arrangement("pfeiffer", tuple((one,) for one in found), invertible=coupling)
    fronts = [prefix_of(site.module) for site in sites(model)]
    prefixes = _all(fronts, Prefix)
    if prefixes and len(prefixes) == len(layers):
        return Arrangement(None, prefixes=prefixes)
    return None


def _all(found: Sequence[object], kind: type[Kind]) -> tuple[Kind, ...]:
    """What was found, where all of it is of this kind, else nothing."""
    kept = tuple(module for module in found if isinstance(module, kind))
    return kept if len(kept) == len(found) else ()


def refusal(settled: Settled) -> str | None:
    """Why AdapterHub's format cannot hold this, or None."""
    kind: str = pretrained(settled.plain).config.model_type
    if kind not in FAMILIES:
        return f"AdapterHub's folders are written for {', '.join(FAMILIES)}, not for {kind!r}"
    found = arrangement(settled.model)
    if found is None:
        return (
            "AdapterHub's format holds adapters of placement houlsby, pfeiffer or parallel, fusions of them and "
            "prefixes, in every layer, and nothing besides them"
        )
    if found.placement == "parallel" and not post_norm(settled.plain):
        return "adapters next to a pre-norm FFN read its normalised input, AdapterHub's the residual stream"
    reason = _alike(found) or _of_size(settled, found)
    if reason is not None:
        return reason
    kinds = (AdaptedNorm, AdaptedOutput, BottleneckLayers, AdapterFusion, Invertible, Inverse, Prefix)
    other = next((module for module in settled.ours.values() if not isinstance(module, kinds)), None)
    if isinstance(other, CompressedEmbedding) and other.first:
        return "AdapterHub leaves a row's positions where they are, and this prefix moves them; shift_positions: false"
    if other is not None:
        return f"AdapterHub's format has no place for {type(other).__name__}"
    return _besides(settled)


def _alike(found: Arrangement) -> str | None:
    """One configuration says what all layers have."""
    modules = [module for layer in found.bottlenecks for module in layer]
    if not modules:
        return None
    if len({(m.down_weight.shape, m.activation, m.scale) for m in modules}) > 1:
        return "its layers have adapters of different sizes, activations or scales, and AdapterHub's format states one"
    coupling = found.invertible
    if coupling is not None and (coupling.width % 2 or coupling.activation != modules[0].activation):
        return "its invertible adapter has another activation than the others, or an odd width"
    return None


def _of_size(settled: Settled, found: Arrangement) -> str | None:
    if not found.prefixes:
        return None
    config = pretrained(settled.plain).config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if any(
        front.key.shape[::2] != (heads, config.hidden_size // config.num_attention_heads) for front in found.prefixes
    ):
        return "AdapterHub takes a head's size to be hidden_size / heads, and this model's is another"
    return None


def _besides(settled: Settled) -> str | None:
    """Why the format cannot hold what has changed besides the modules, or None."""
    rows = fitting(settled.plain)
    of_head = tuple(f"{path}." for path in rows[0].layers) if rows else ()
    for name in settled.changed:
        if name not in settled.base or name.startswith(of_head) or not (rows or of_backbone(settled.plain, name)):
            continue
        what = "trained LayerNorms (method adapter, placement houlsby trains them)" if "norm" in name.lower() else "it"
        return f"{name!r} is not the base's any more, and AdapterHub's format has no place for {what}"
    return None
