"""Models that give a text one vector: any backbone, its tokens pooled, the length made one."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressft.errors import UserError

Pooling = Literal["mean", "cls", "last"]
# Asked of `load_model` as transformers' own auto classes are.
AUTO_CLASS = "AutoModelForEmbedding"
SUFFIX = "ForEmbedding"
# The configuration's field that says how tokens are pooled.
POOLING = "sentence_pooling"


def pooled(states: Tensor, mask: Tensor | None, how: Pooling) -> Tensor:
    """(B, T, d) -> (B, d): the mean of the real tokens, the first or the last of them.

    Args:
        mask: (B, T), 0 at paddings, which stand on either side; None: there are none.
    """
    real = torch.ones_like(states[..., 0]) if mask is None else mask.to(states.dtype)
    if how == "mean":
        return (states * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1.0)
    # The first token of all that have the greatest count up to there.
    counts = real.cumsum(1)
    place = (real if how == "cls" else counts).argmax(1)
    return states.gather(1, place[:, None, None].expand(-1, 1, states.shape[-1]))[:, 0]


@cache
def embedding_class(config_class: type[Any]) -> type[Any]:
    """The class of embedding models of a family, "BertForEmbedding" for BERT: `logits` are the unit vectors (B, d).

    Made from transformers' own classes: the backbone has the name that other heads of the family give it, so that
    checkpoints load, and heads are exchanged, as they are.

    Raises:
        UserError: transformers has no backbone of this family.
    """
    from transformers import AutoModel
    from transformers.modeling_outputs import SequenceClassifierOutput

    if config_class not in AutoModel._model_mapping:
        raise UserError(f"model: a {config_class.__name__} has no backbone that could give embeddings")
    found: Any = AutoModel._model_mapping[config_class]
    backbone: Any = found[0] if isinstance(found, tuple) else found
    # What all heads of the family are: weights are drawn and attention is chosen as there.
    parent: Any = backbone.__mro__[1]
    plain = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(backbone).parameters else {}

    def __init__(self: Any, config: Any, pooling: Pooling | None = None) -> None:
        parent.__init__(self, config)
        setattr(config, POOLING, pooling or getattr(config, POOLING, None) or "mean")
        setattr(self, backbone.base_model_prefix, backbone(config, **plain))
        self.post_init()

    def forward(
        self: Any, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> SequenceClassifierOutput:
        outputs = getattr(self, backbone.base_model_prefix)(
            input_ids=input_ids, attention_mask=attention_mask, **kwargs, return_dict=True
        )
        # In fp32: a vector's length is a sum over all of it.
        vectors = pooled(outputs.last_hidden_state, attention_mask, getattr(self.config, POOLING)).float()
        return SequenceClassifierOutput(
            logits=F.normalize(vectors, dim=-1),  # type: ignore[arg-type]
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),
        )

    name = backbone.__name__.removesuffix("Model") + SUFFIX
    body = {"__init__": __init__, "forward": forward, "__module__": __name__, "__doc__": backbone.__doc__}
    return type(name, (parent,), {**body, "config_class": config_class})


def gives_vectors(model: nn.Module) -> bool:
    """Whether a model's `logits` are an embedding rather than scores of classes."""
    return type(model).__name__.endswith(SUFFIX)


def class_named(name: str) -> type[Any] | None:
    """The class of a saved model's `architecture`; None where nobody knows it."""
    import transformers

    kind = getattr(transformers, name, None)
    if kind is None and name.endswith(SUFFIX):
        backbone = getattr(transformers, name.removesuffix(SUFFIX) + "Model", None)
        config_class = getattr(backbone, "config_class", None)
        kind = embedding_class(config_class) if isinstance(config_class, type) else None
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None
