"""Load pretrained models, plain or compressed, ready to train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compressft.errors import UserError
from compressft.model.anatomy import family_of
from compressft.model.embedder import AUTO_CLASS, POOLING, embedding_class, gives_vectors
from compressft.model.finite import refuse_broken
from compressft.model.labels import other_labels, renew_head
from compressft.model.source import resolve
from compressft.modules.attention import TRAINING, register
from compressft.modules.dropout import quicken
from compressft.utils.foreign import foreign, load_config
from compressft.utils.hub import pinned

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Classes whose head has an output a label.
HEADS = ("ForSequenceClassification", "ForTokenClassification")


def load_model(name: str, auto_class: str = "AutoModel", new_head: bool = False, **kwargs: Any) -> nn.Module:
    """Load a pretrained model (a compressed `model/` folder of ours included) ready to train.

    Args:
        name: a shipped name, a folder or a hub id; "owner/name@v1.0" is a branch, tag or commit of it.
        auto_class: the transformers class, such as "AutoModelForSequenceClassification"; or "AutoModelForEmbedding".
        new_head: draw the head again where it is for other labels than `id2label` or `num_labels` say; else such a
            checkpoint is refused.
        kwargs: passed to `from_pretrained` (`num_labels`, ...); `pad_token_id` is for a model that has none.

    Returns:
        the model in fp32, its attention and dropout routed through compressft.

    Raises:
        UserError: nothing can be loaded from `name`, or it is an encoder and a causal language model is asked for.
    """
    import transformers

    register()
    source = resolve(name)
    if (Path(source) / "compressft.json").is_file():
        from compressft.model.saved.compressed import load_compressed

        model = load_compressed(source)
        if auto_class == AUTO_CLASS:
            if not gives_vectors(model):
                raise UserError(f"model: {name!r} was compressed for another task than embedding; give its own base")
            setattr(model.config, POOLING, kwargs.get("pooling") or getattr(model.config, POOLING))
        wanted, has = kwargs.get("num_labels"), getattr(model.config, "num_labels", None)
        if wanted is not None and wanted != has:
            raise UserError(f"model: {name!r} was compressed for {has} labels, the data has {wanted}")
        if new_head and answers_others(model.config, kwargs):
            renew_head(model)
        for field in ("id2label", "label2id"):
            if field in kwargs:
                setattr(model.config, field, kwargs[field])
        refuse_broken(model, name)
        return model
    kind: Any = embedding_class(type(load_config(source))) if auto_class == AUTO_CLASS else None
    kind, pad = kind or getattr(transformers, auto_class), kwargs.pop("pad_token_id", None)
    renewed = new_head and answers_others(load_config(source), kwargs)
    with foreign(f"model: {name!r} could not be loaded"):
        where, revision = pinned(source)
        model = kind.from_pretrained(
            where,
            revision=revision or "main",
            attn_implementation=TRAINING,
            dtype=torch.float32,
            trust_remote_code=False,
            ignore_mismatched_sizes=renewed,
            **kwargs,
        )
    refuse_broken(model, name)
    if renewed:
        renew_head(model)
    if model.config.pad_token_id is None:
        # The position that a classifier reads is found by it.
        model.config.pad_token_id = pad
    if auto_class == "AutoModelForCausalLM" and not (family_of(model).causal or model.config.is_decoder):
        raise UserError(f"model: {name!r} sees later tokens, which a causal language model must not; give a decoder")
    quicken(model)
    return model


def answers_others(config: PretrainedConfig, wanted: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has a head that answers another question than the one that is `wanted`."""
    has_head = any(name.endswith(HEADS) for name in config.architectures or ())
    if not has_head or "num_labels" not in wanted:
        return False
    labels = list(wanted.get("id2label", {}).values())
    return config.num_labels != wanted["num_labels"] or other_labels(config, labels)


def load_empty(name: str, auto_class: str, **kwargs: Any) -> nn.Module:
    """A model's shapes on the meta device; no weight is read. Arguments and errors as `load_model`."""
    import transformers

    register()
    pad, pooling = kwargs.pop("pad_token_id", None), kwargs.pop("pooling", None)
    config = load_config(resolve(name), **kwargs)
    config.pad_token_id = pad if config.pad_token_id is None else config.pad_token_id
    with foreign(f"model: {name!r} could not be built"), torch.device("meta"):
        if auto_class == AUTO_CLASS:
            setattr(config, POOLING, pooling)
            return embedding_class(type(config))._from_config(config, attn_implementation=TRAINING)
        return getattr(transformers, auto_class).from_config(
            config, attn_implementation=TRAINING, trust_remote_code=False
        )
