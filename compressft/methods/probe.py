"""Probe: a frozen encoder in eval mode, its features computed once per example, and a head trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.methods.layers import Layers
from compressft.methods.scalar_mix import EVERY_LAYER, add_mix, mix_of
from compressft.model.anatomy import anatomy, refuse_pairs
from compressft.modules.dtypes import like
from compressft.modules.gate import Gate
from compressft.modules.head import Body, HeadDesign, Pooling, ProbeHead, mean_of_tokens
from compressft.modules.linear import CompressedLinear
from compressft.modules.pretrained import pretrained
from compressft.modules.quantizer import Quantizer
from compressft.transform import WEIGHTS, Claim, Context, Resource, Transform, Want, without_labels
from compressft.utils.phases import steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    from transformers.utils.generic import ModelOutput

NAME = "probe_head"
# Below this, a dimension does not vary.
LEAST_DEVIATION = 1e-6
# Training rows that are encoded at once to standardise features.
ENCODED_ROWS = 32


class Probe(Transform):
    """Train pooler and head on the frozen backbone's last hidden states (Peters, Ruder & Smith 2019, arXiv:1903.05987).

    The backbone runs without dropout and without a graph, once per distinct example; `cache: false` runs it every time.
    Next to passes it keeps the graph of what they learn, gates and ranges.
    The cache holds T * d fp32 values per example in memory.

    Fields: `head`: what stands in front of the model's own head: "linear" nothing, "mlp" Linear - gelu - Linear on each
    token, "bilstm" an LSTM in each direction over the tokens. `size`: width inside the MLP (default d), or of one
    direction (default d / 2). `features`: "last", or "scalar_mix", a learned sum of all layers (method scalar_mix),
    which is not cached. `standardise`: features less their mean over their standard deviation, both over the training
    rows: of the token that the model's own head reads where nothing else stands in front of it, else of all tokens.
    `pooling`: "own", whatever the model's own head reads, or "mean": it reads the mean over a row's tokens.
    """

    type: Literal["probe"] = "probe"
    cache: bool | None = None
    head: Body = "linear"
    size: int | None = Field(default=None, ge=1)
    features: Literal["last", "scalar_mix"] = "last"
    standardise: bool = False
    pooling: Pooling = "own"

    @model_validator(mode="after")
    def _consistent(self) -> Probe:
        if self.size is not None and self.head == "linear":
            raise ValueError("size is for head 'mlp' or 'bilstm'; leave it out")
        if self.features == "scalar_mix" and self.cache:
            raise ValueError("cache keeps the last layer's states alone; set it to false, or features to 'last'")
        return self

    @property
    def caches(self) -> bool:
        """Whether features are kept."""
        return self.features == "last" if self.cache is None else self.cache

    @property
    def _adds_head(self) -> bool:
        return self.head != "linear" or self.standardise or self.pooling == "mean"

    def prepare(self, model: nn.Module, context: Context) -> None:
        parts = anatomy(model)
        refuse_pairs(model, "method probe")
        if self.head == "bilstm" and parts.family.causal and pretrained(model).get_output_embeddings() is not None:
            raise UserError("method probe.head: 'bilstm' lets a language model see later tokens; use 'mlp'")
        if self.pooling == "mean" and not _classifies_rows(model):
            raise UserError(
                "method probe.pooling: 'mean' gives all tokens of a row the same; leave it out for this task"
            )
        if hasattr(parts.backbone, NAME):
            raise UserError("method probe: an earlier stage left a probe's head in the model; use another method here")
        Layers(top=0).prepare(model, context)
        backbone = parts.backbone
        pooler = getattr(backbone, parts.family.pooler, None) if parts.family.pooler else None
        frozen = FrozenForward(backbone, pooler, {} if self.caches else None)
        # Importance and learned gates want gradients of the layers' outputs.
        frozen.live = any(other.order >= WEIGHTS for other in context.transforms)
        if self.features == "scalar_mix":
            add_mix(model, True, "none").requires_grad_(True)
            frozen.live = True
        if self._adds_head:
            frozen.head = self._add_head(model, frozen, context)
        # An instance attribute shadows the class's forward: no module is renamed, so checkpoints keep their names.
        backbone.forward = frozen

    def param_groups(self, model: nn.Module, context: Context) -> list[dict[str, object]]:
        if self.features != "scalar_mix":
            return []
        return [{"params": list(mix_of(model).parameters()), "weight_decay": 0.0}]

    def _add_head(self, model: nn.Module, frozen: FrozenForward, context: Context) -> ProbeHead:
        parts = anatomy(model)
        generator = torch.Generator().manual_seed(context.seed)
        size = self.size or (max(parts.width // 2, 1) if self.head == "bilstm" else parts.width)
        head = ProbeHead(HeadDesign(parts.width, self.head, size, self.standardise, self.pooling), generator)
        head.to(next(model.parameters()).device)
        # A plan's tensors have no values.
        if self.standardise and head.mean.device.type != "meta":
            mean, deviation = self._statistics(model, frozen, head, context)
            head.mean.copy_(mean)
            head.deviation.copy_(deviation)
            if frozen.cache and len(context.transforms) > 1:
                # Passes such as nf4 may still change what is encoded.
                frozen.cache.clear()
        parts.backbone.add_module(NAME, head)
        head.attach(parts.backbone)
        head.enabled = frozen.live
        return head

    @torch.no_grad()
    def _statistics(
        self, model: nn.Module, frozen: FrozenForward, head: ProbeHead, context: Context
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per dimension over the training rows, (d,) each."""
        if context.data is None:
            raise UserError("method probe.standardise: needs training rows to look at; run it in a recipe's stage")
        one_token = self.head == "linear" and _classifies_rows(model)
        causal, device = anatomy(model).family.causal, next(model.parameters()).device
        total = squares = torch.zeros(())
        number = 0
        batches = context.data.batches(len(context.data.features), ENCODED_ROWS, context.seed)
        for batch in steps(batches, "method probe: features of the training rows"):
            batch = {name: value.to(device) for name, value in without_labels(batch).items()}
            real, rows = batch["attention_mask"].bool(), frozen.features(**batch)
            if head.pools_features:
                rows, real = mean_of_tokens(rows, batch["attention_mask"]), real.any(1, keepdim=True)
            elif one_token:
                place = real.long().cumsum(1)
                real = real & (place == (place[:, -1:] if causal else 1))
            # In double precision: a difference of large sums.
            rows = rows[real].double().cpu()
            total, squares, number = total + rows.sum(0), squares + rows.square().sum(0), number + len(rows)
        mean = total / number
        deviation = (squares / number - mean.square()).clamp(min=0).sqrt()
        return mean, torch.where(deviation < LEAST_DEVIATION, 1.0, deviation)

    def finalize(self, model: nn.Module) -> None:
        backbone = anatomy(model).backbone
        del backbone.forward
        if hasattr(backbone, NAME):
            getattr(backbone, NAME).enabled = True

    def changes(self) -> Sequence[Claim]:
        return (Claim(Resource.INSIDE, "keeps no hidden states"),)

    def wants(self) -> Sequence[Want]:
        found = list(EVERY_LAYER) if self._adds_head or self.features != "last" else []
        if self.caches:
            fix = "set method.cache to false, or compress in a stage of its own"
            found.append(Want(Resource.FEATURES, "computes features once", "cache", fix))
        return found


def _classifies_rows(model: nn.Module) -> bool:
    return "SequenceClassification" in type(model).__name__


# Arguments that ask for more than the last hidden states.
WHOLE = ("output_hidden_states", "output_attentions")


class FrozenForward:
    """Replacement for a frozen backbone's forward, with an optional cache keyed by an example's own token ids.

    Attributes:
        head: what is trained on the features before pooler and the model's own head, None where nothing is.
        live: whether something that learns reads the layers or sits in them, so that their graph is not to be cut off.
    """

    def __init__(self, backbone: PreTrainedModel, pooler: nn.Module | None, cache: dict[bytes, Tensor] | None) -> None:
        self.backbone = backbone
        self.original = backbone.forward
        self.pooler = pooler
        self.cache = cache
        self.head: ProbeHead | None = None
        self.live = False

    def __call__(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: object
    ) -> ModelOutput:
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as Output

        if self.live:
            return self._evaluated(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if input_ids is None or any(kwargs.get(name) for name in WHOLE) or kwargs.get("past_key_values") is not None:
            return self._whole(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        hidden = self.features(input_ids, attention_mask, **kwargs)
        if self.head is not None:
            hidden = self.head(hidden, attention_mask)
        (hidden,) = like(next(self.backbone.parameters()), hidden)
        pooled = self.pooler(hidden) if self.pooler is not None else None
        return Output(last_hidden_state=hidden, pooler_output=pooled)  # type: ignore[arg-type]

    def features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: object) -> Tensor:
        """The last hidden states (B, T, d), without a graph; of padded tokens a cache gives zeros."""
        if self.cache is None:
            return self._encode(input_ids, attention_mask, kwargs)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return self._cached(self.cache, input_ids, attention_mask, kwargs)

    def _whole(self, **kwargs: object) -> BaseModelOutputWithPooling:
        """The backbone's own output with the head on top: what is generated with a key/value cache, say."""
        output = self._evaluated(**kwargs)
        if self.head is not None:
            output.last_hidden_state = self.head(output.last_hidden_state, kwargs["attention_mask"])
            if self.pooler is not None:
                output.pooler_output = self.pooler(output.last_hidden_state)
        return output

    def _evaluated(self, **kwargs: object) -> BaseModelOutputWithPooling:
        modes = {module: module.training for module in self.backbone.modules()}
        self.backbone.eval()
        for module, mode in modes.items():
            if isinstance(module, CompressedLinear | Gate | Quantizer):
                # What passes learn, they learn from training; there is no dropout in these.
                module.training = mode
        try:
            return self.original(**kwargs)
        finally:
            for module, mode in modes.items():
                module.training = mode

    @torch.no_grad()
    def _encode(self, input_ids: Tensor, attention_mask: Tensor | None, kwargs: dict[str, object]) -> Tensor:
        return self._evaluated(input_ids=input_ids, attention_mask=attention_mask, **kwargs)[0]

    def _cached(
        self, cache: dict[bytes, Tensor], input_ids: Tensor, attention_mask: Tensor, kwargs: dict[str, object]
    ) -> Tensor:
        masks = attention_mask.bool()
        segments = kwargs.get("token_type_ids")
        assert segments is None or isinstance(segments, Tensor)
        device = input_ids.device.type
        # Features of another precision are others.
        precision = str(torch.get_autocast_dtype(device)).encode() if torch.is_autocast_enabled(device) else b""
        keys = []
        for row in range(len(input_ids)):
            ids = input_ids[row][masks[row]].cpu().numpy().tobytes()
            keys.append(
                precision + ids + (b"" if segments is None else segments[row][masks[row]].cpu().numpy().tobytes())
            )
        missing = [row for row, key in enumerate(keys) if key not in cache]
        if missing:
            index = torch.tensor(missing, device=input_ids.device)
            rows = {name: v[index] if isinstance(v, Tensor) else v for name, v in kwargs.items()}
            new = self._encode(input_ids[index], attention_mask[index], rows)
            for position, row in enumerate(missing):
                cache[keys[row]] = new[position][masks[row]].float().cpu()
        width = next(iter(cache.values())).shape[-1]
        hidden = torch.zeros(*input_ids.shape, width, device=input_ids.device)
        for row, key in enumerate(keys):
            hidden[row, masks[row]] = cache[key].to(hidden.device)
        return hidden
