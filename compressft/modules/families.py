"""One row per model family: the attribute names of its parts. Nothing else knows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """Attribute paths of one model family; layer-level paths are relative to one layer.

    `fused_qkv` replaces q, k and v where one projection yields all three. `up` lists every projection into the FFN's
    hidden neurons (two for gated FFNs). `attention_out` and `ffn_out` are the modules whose output is added to the
    residual stream (after dropout, where the family has one). `ffn_norm` is the LayerNorm after the FFN's residual add
    in post-norm families, None in pre-norm ones; these have a `final_norm` above the top layer instead.
    `embedding_tables` are tables looked up by one index per token, the tokens' own first; `positions` is the one whose
    index is the token's place, None where places act otherwise (rotary, relative, with an offset of the table's own).

    Who else touches the residual stream: `norms` are a layer's norms over it, `embedding_norm` is the one above the
    tables. `embedding_projection` maps narrower embeddings to it, in models that have it. `readers` are the linear
    layers of the heads, seen from the whole model ("@" stands for the backbone): of each tuple the first that exists
    reads the stream. `transforms` are (dense, norm, decoder) of language-model heads, which stay in the stream's
    coordinates because the decoder shares the token embedding. `own_head_size`: the configuration states head_dim
    next to hidden_size, so that either can change alone.

    Encoder-decoder families: the row is the encoder's, `decoder` is the row of the decoder's layers, which have a
    `cross` attention with projections `cross_linears` (q, k, v, o) and output `cross_out` besides. `fixed_heads`: all
    layers share what is said per head (T5's relative position bias), so that no head can go.
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
    positions: str | None = None
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
    decoder: Family | None = None
    cross: str | None = None
    cross_linears: tuple[str, ...] = ()
    cross_out: str | None = None
    fixed_heads: bool = False
    # Attributes of the attention module that repeat its shape: (query heads, KV heads, head_dim) -> value.
    shape_attributes: dict[str, Callable[[int, int, int], int]] = field(default_factory=dict)


_BERT_EMBEDDINGS = tuple(f"embeddings.{part}_embeddings" for part in ("word", "position", "token_type"))
_BERT = Family(
    layers="encoder.layer",
    embeddings=("embeddings",),
    embedding_tables=_BERT_EMBEDDINGS,
    positions=_BERT_EMBEDDINGS[1],
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
    positions=_BERT_EMBEDDINGS[1],
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
    positions="wpe",
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


def _t5(stack: str, ffn: int, decoder: Family | None) -> Family:
    """T5's blocks hold a list: self-attention, in the decoder cross-attention, and the FFN at position `ffn`."""
    cross = ffn == 2
    return Family(
        layers=f"{stack}.block",
        embeddings=("shared",),
        embedding_tables=("shared",),
        attention="layer.0.SelfAttention",
        q="layer.0.SelfAttention.q",
        k="layer.0.SelfAttention.k",
        v="layer.0.SelfAttention.v",
        o="layer.0.SelfAttention.o",
        up=(f"layer.{ffn}.DenseReluDense.wi", f"layer.{ffn}.DenseReluDense.wi_0", f"layer.{ffn}.DenseReluDense.wi_1"),
        down=f"layer.{ffn}.DenseReluDense.wo",
        attention_out="layer.0.dropout",
        ffn_out=f"layer.{ffn}.dropout",
        final_norm=f"{stack}.final_layer_norm",
        norms=tuple(f"layer.{i}.layer_norm" for i in range(ffn + 1)),
        causal=cross,
        head_size="key_value_proj_dim",
        decoder=decoder,
        cross="layer.1.EncDecAttention" if cross else None,
        cross_linears=tuple(f"layer.1.EncDecAttention.{part}" for part in "qkvo") if cross else (),
        cross_out="layer.1.dropout" if cross else None,
        fixed_heads=True,
    )


def _bart(stack: str, decoder: Family | None) -> Family:
    cross = stack == "decoder"
    return Family(
        layers=f"{stack}.layers",
        embeddings=("shared", "encoder.embed_positions", "decoder.embed_positions"),
        embedding_tables=("shared", "encoder.embed_positions", "decoder.embed_positions"),
        attention="self_attn",
        q="self_attn.q_proj",
        k="self_attn.k_proj",
        v="self_attn.v_proj",
        o="self_attn.out_proj",
        up=("fc1",),
        down="fc2",
        attention_out="self_attn.out_proj",
        ffn_out="fc2",
        ffn_norm="final_layer_norm",
        norms=("self_attn_layer_norm", *(("encoder_attn_layer_norm",) if cross else ()), "final_layer_norm"),
        embedding_norm=f"{stack}.layernorm_embedding",
        readers=(("classification_head.dense",), ("qa_outputs",), ("lm_head",)),
        causal=cross,
        head_size="head_dim",
        shape_attributes={"num_heads": lambda heads, kv, dim: heads},
        decoder=decoder,
        cross="encoder_attn" if cross else None,
        cross_linears=tuple(f"encoder_attn.{part}_proj" for part in ("q", "k", "v", "out")) if cross else (),
        cross_out="encoder_attn.out_proj" if cross else None,
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
    "t5": _t5("encoder", 1, _t5("decoder", 2, None)),
    "bart": _bart("encoder", _bart("decoder", None)),
}
