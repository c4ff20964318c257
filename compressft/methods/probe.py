"""Linear probe: a frozen encoder, its features computed once per example, and a head trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressft.anatomy import anatomy
from compressft.methods.layers import Layers
from compressft.transform import WEIGHTS, Context, Transform


class Probe(Transform):
    """Train pooler and head on the frozen backbone's last hidden states (Peters, Ruder & Smith 2019, arXiv:1903.05987).

    The backbone runs in eval mode without a graph, once per distinct example; `cache: false` runs it every time.
    The cache holds T * d fp32 values per example in memory.
    """

    type: Literal["probe"] = "probe"
    cache: bool = True

    def prepare(self, model: nn.Module, context: Context) -> None:
        Layers(top=0).prepare(model, context)
        parts = anatomy(model)
        backbone: Any = parts.backbone
        pooler = getattr(backbone, parts.family.pooler, None) if parts.family.pooler else None
        # An instance attribute shadows the class's forward: no module is renamed, so checkpoints keep their names.
        backbone.forward = FrozenForward(backbone, pooler, {} if self.cache else None)

    def finalize(self, model: nn.Module) -> None:
        del anatomy(model).backbone.forward

    def conflict(self, others: Sequence[Transform]) -> str | None:
        for other in others:
            if self.cache and other.order >= WEIGHTS:
                return (
                    f"method 'probe' caches features that pass {other.type!r} would change; "
                    "set method.cache to false, or compress in a stage of its own"
                )
        return None


class FrozenForward:
    """Replacement for a frozen backbone's forward, with an optional cache keyed by an example's own token ids."""

    def __init__(self, backbone: Any, pooler: nn.Module | None, cache: dict[bytes, Tensor] | None) -> None:
        self.backbone = backbone
        self.original = backbone.forward
        self.pooler = pooler
        self.cache = cache

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as Output

        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if self.cache is None:
            hidden = self._encode(input_ids, attention_mask, kwargs)
        else:
            hidden = self._cached(self.cache, input_ids, attention_mask, kwargs)
        pooled = self.pooler(hidden) if self.pooler is not None else None
        return Output(last_hidden_state=hidden, pooler_output=pooled)  # type: ignore[arg-type]

    @torch.no_grad()
    def _encode(self, input_ids: Tensor, attention_mask: Tensor, kwargs: dict[str, Any]) -> Tensor:
        was_training = self.backbone.training
        self.backbone.eval()
        try:
            return self.original(input_ids=input_ids, attention_mask=attention_mask, **kwargs)[0]
        finally:
            self.backbone.train(was_training)

    def _cached(
        self, cache: dict[bytes, Tensor], input_ids: Tensor, attention_mask: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        masks = attention_mask.bool()
        segments = kwargs.get("token_type_ids")
        keys = []
        for row in range(len(input_ids)):
            ids = input_ids[row][masks[row]].cpu().numpy().tobytes()
            keys.append(ids + (b"" if segments is None else segments[row][masks[row]].cpu().numpy().tobytes()))
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
