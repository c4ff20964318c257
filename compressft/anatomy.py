"""Where the parts of a model family are: one row per family; nothing else knows a family's attribute names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from compressft.errors import UserError


@dataclass(frozen=True)
class Family:
    """Attribute paths of one model family; layer-level paths are relative to one layer.

    `fused_qkv` replaces q, k and v where one projection yields all three. `up` lists every projection into the FFN's
    hidden neurons (two for gated FFNs). `attention_out` and `ffn_out` are the modules whose output is added to the
    residual stream (after dropout, where the family has one). `ffn_norm` is the LayerNorm after the FFN's residual add
    in post-norm families, None in pre-norm ones; these have a `final_norm` above the top layer instead.
    `embedding_tables` are tables looked up by one index per token.
    """

    layers: str
    embeddings: tuple[str, ...]
    embedding_tables: tuple[str, ...]
    attention: str
    o: str
    up: tuple[str, ...]
    down: str
    attention_out: str
    ffn_out: str
    q: str | None = None
    k: str | None = None
    v: str | None = None
    fused_qkv: str | None = None
    ffn_norm: str | None = None
    pooler: str | None = None
    final_norm: str | None = None
    causal: bool = False
    head_size: str = "attention_head_size"
    # Attributes of the attention module that repeat its shape: (query heads, KV heads, head_dim) -> value.
    shape_attributes: dict[str, Callable[[int, int, int], int]] = field(default_factory=dict)


_BERT_EMBEDDINGS = tuple(f"embeddings.{part}_embeddings" for part in ("word", "position", "token_type"))
_BERT = Family(
    layers="encoder.layer",
    embeddings=("embeddings",),
    embedding_tables=_BERT_EMBEDDINGS,
    attention="attention.self",
    q="attention.self.query",
    k="attention.self.key",
    v="attention.self.value",
    o="attention.output.dense",
    up=("intermediate.dense",),
    down="output.dense",
    attention_out="attention.output.dropout",
    ffn_out="output.dropout",
    ffn_norm="output.LayerNorm",
    pooler="pooler",
    shape_attributes={
        "num_attention_heads": lambda heads, kv, dim: heads,
        "all_head_size": lambda heads, kv, dim: heads * dim,
    },
)
_DISTILBERT = Family(
    layers="transformer.layer",
    embeddings=("embeddings",),
    embedding_tables=_BERT_EMBEDDINGS[:2],
    attention="attention",
    q="attention.q_lin",
    k="attention.k_lin",
    v="attention.v_lin",
    o="attention.out_lin",
    up=("ffn.lin1",),
    down="ffn.lin2",
    attention_out="attention.out_lin",
    ffn_out="ffn.dropout",
    ffn_norm="output_layer_norm",
    shape_attributes={"n_heads": lambda heads, kv, dim: heads},
)
_LLAMA = Family(
    layers="layers",
    embeddings=("embed_tokens",),
    embedding_tables=("embed_tokens",),
    attention="self_attn",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    attention_out="self_attn.o_proj",
    ffn_out="mlp.down_proj",
    final_norm="norm",
    causal=True,
    head_size="head_dim",
)
_GPT2 = Family(
    layers="h",
    embeddings=("wte", "wpe"),
    embedding_tables=("wte", "wpe"),
    attention="attn",
    fused_qkv="attn.c_attn",
    o="attn.c_proj",
    up=("mlp.c_fc",),
    down="mlp.c_proj",
    attention_out="attn.resid_dropout",
    ffn_out="mlp.dropout",
    final_norm="ln_f",
    causal=True,
    head_size="head_dim",
    shape_attributes={
        "num_heads": lambda heads, kv, dim: heads,
        "split_size": lambda heads, kv, dim: heads * dim,
    },
)

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "distilbert": _DISTILBERT,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": _GPT2,
}


@dataclass(frozen=True)
class Layer:
    """One transformer layer: its module, the family's paths into it, and its present shape."""

    index: int
    name: str
    module: nn.Module
    family: Family
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int

    def part(self, path: str) -> nn.Module:
        """The module at a layer-relative path."""
        return self.module.get_submodule(path)

    @property
    def projections(self) -> tuple[str, ...]:
        """Paths of the attention's input projections."""
        f = self.family
        return (f.fused_qkv,) if f.fused_qkv else tuple(p for p in (f.q, f.k, f.v) if p)

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of all linear projections, in execution order."""
        return (*self.projections, self.family.o, *self.family.up, self.family.down)


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model. `prefix` is the backbone's name inside the model ('' where the model is the backbone)."""

    family: Family
    prefix: str
    backbone: nn.Module
    layers: tuple[Layer, ...]

    def path(self, relative: str) -> str:
        """A backbone-relative path as seen from the whole model."""
        return f"{self.prefix}.{relative}" if self.prefix else relative

    @property
    def embedding_paths(self) -> tuple[str, ...]:
        """Model-level paths of the embedding modules."""
        return tuple(self.path(p) for p in self.family.embeddings)


def family_of(model: nn.Module) -> Family:
    """The row of a transformers model's family.

    Raises:
        UserError: the family is unknown; the message lists the known ones.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"model: family {model_type!r} is not known to anatomy; known families: {known}")
    return FAMILIES[model_type]


def anatomy(model: nn.Module) -> Anatomy:
    """Look at a transformers model as it is now, pruned or not; shapes are read from its weights."""
    family = family_of(model)
    prefix = getattr(model, "base_model_prefix", "")
    prefix = prefix if prefix and hasattr(model, prefix) else ""
    backbone = model.get_submodule(prefix)
    stack = backbone.get_submodule(family.layers)
    assert isinstance(stack, nn.ModuleList)
    root = f"{prefix}.{family.layers}" if prefix else family.layers
    return Anatomy(
        family,
        prefix,
        backbone,
        tuple(_layer(family, i, f"{root}.{i}", module) for i, module in enumerate(stack)),
    )


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a Linear or of GPT-2's Conv1D, whose weight is (in, out)."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    rows, columns = weight.shape
    return (rows, columns) if type(module).__name__ == "Conv1D" else (columns, rows)


def _layer(family: Family, index: int, name: str, module: nn.Module) -> Layer:
    attention = module.get_submodule(family.attention)
    head_dim = int(getattr(attention, family.head_size))
    width = linear_shape(module.get_submodule(family.o))[0]
    kv_width = width if family.k is None else linear_shape(module.get_submodule(family.k))[1]
    return Layer(
        index=index,
        name=name,
        module=module,
        family=family,
        heads=width // head_dim,
        kv_heads=kv_width // head_dim,
        head_dim=head_dim,
        ffn=linear_shape(module.get_submodule(family.down))[0],
    )
