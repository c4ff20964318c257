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

    Who else touches the residual stream: `norms` are a layer's norms over it, `embedding_norm` is the one above the
    tables. `embedding_projection` maps narrower embeddings to it, in models that have it. `readers` are the linear
    layers of the heads, seen from the whole model ("@" stands for the backbone): of each tuple the first that exists
    reads the stream. `transforms` are (dense, norm, decoder) of language-model heads, which stay in the stream's
    coordinates because the decoder shares the token embedding. `own_head_size`: the configuration states head_dim
    beside hidden_size, so that either can change alone.
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
    norms: tuple[str, ...] = ()
    embedding_norm: str | None = None
    embedding_projection: str | None = None
    readers: tuple[tuple[str, ...], ...] = ()
    transforms: tuple[tuple[str, str, str], ...] = ()
    own_head_size: bool = False
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
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    embedding_norm="embeddings.LayerNorm",
    embedding_projection="embeddings_project",
    readers=(
        ("@.pooler.dense", "classifier.dense", "classifier"),
        ("qa_outputs",),
        ("discriminator_predictions.dense",),
    ),
    transforms=(
        ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.decoder"),
        ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
        ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head"),
    ),
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
    norms=("sa_layer_norm", "output_layer_norm"),
    embedding_norm="embeddings.LayerNorm",
    readers=(("pre_classifier", "classifier"), ("qa_outputs",)),
    transforms=(("vocab_transform", "vocab_layer_norm", "vocab_projector"),),
    shape_attributes={"n_heads": lambda heads, kv, dim: heads},
)
# Heads of decoders: one linear layer on the final norm's output.
_TOP = (("lm_head",), ("score",), ("classifier",), ("qa_outputs",))
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
    norms=("input_layernorm", "post_attention_layernorm"),
    readers=_TOP,
    own_head_size=True,
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
    norms=("ln_1", "ln_2"),
    readers=_TOP,
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
class Stream:
    """Model-level paths of everything that touches the residual stream.

    `norms` normalise it, `reads` are linear layers whose columns are its dimensions, `writes` those whose rows are,
    `tables` embeddings whose columns are. `projection` (also among `writes`) writes it without a norm behind.
    """

    norms: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    tables: tuple[str, ...]
    projection: str | None


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
    def width(self) -> int:
        """Dimensions of the residual stream."""
        return linear_shape(self.layers[0].part(self.layers[0].projections[0]))[0]

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


def stream(model: nn.Module) -> Stream:
    """Who reads, writes and normalises the residual stream of a model with any of its family's heads."""
    parts = anatomy(model)
    family = parts.family

    def found(path: str | None) -> str | None:
        """The model-level path, or None where this model has no such module (a pooler may be there as None)."""
        if path is None:
            return None
        path = path.replace("@.", f"{parts.prefix}." if parts.prefix else "")
        owner: object = model
        for name in path.split("."):
            owner = getattr(owner, name, None)
        return path if isinstance(owner, nn.Module) else None

    projection = found(family.embedding_projection and f"@.{family.embedding_projection}")
    norms, reads, writes = [], [], [projection] if projection else []
    tables = () if projection else tuple(parts.path(table) for table in family.embedding_tables)
    if tables and family.embedding_norm:
        norms.append(parts.path(family.embedding_norm))
    for layer in parts.layers:
        norms += [f"{layer.name}.{path}" for path in family.norms]
        reads += [f"{layer.name}.{path}" for path in (*layer.projections, *family.up)]
        writes += [f"{layer.name}.{path}" for path in (family.o, family.down)]
    if family.final_norm:
        norms.append(parts.path(family.final_norm))
    reads += [path for group in family.readers for path in [p for p in map(found, group) if p][:1]]
    for dense, norm, decoder in family.transforms:
        if found(dense):
            reads.append(dense)
            if tables:
                writes.append(dense)
                norms.append(norm)
                reads.append(decoder)
    return Stream(tuple(norms), tuple(reads), tuple(writes), tables, projection)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a Linear or of GPT-2's Conv1D, whose weight is (in, out)."""
    if isinstance(module, nn.Linear):
        # Its weight may be stored otherwise than as a tensor of its shape.
        return module.in_features, module.out_features
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
