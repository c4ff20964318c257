"""AdapterFusion: learn, token by token and layer by layer, which of several saved adapters to listen to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.methods.layers import Layers
from compressft.methods.places import as_saved
from compressft.model.anatomy import anatomy, refuse_pairs
from compressft.model.saved.adapters import read_adapters
from compressft.model.surgery import adapter_in, put_after_ffn
from compressft.modules.fusion import AdapterFusion
from compressft.transform import Context, Transform, Want, ramp

# Where configurations state the dropout of attention's probabilities.
DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")


class Fusion(Transform):
    """Pfeiffer et al. (EACL 2021): an attention over N frozen adapters in Pfeiffer's place, and a new head.

    out = LN(W_v sum_n p_n z_n + f + h), with the query from LN(f + h) and z_n = up_n(act(down_n(LN(f + h)))); the one
    pretrained LayerNorm is applied twice. In pre-norm families f + W_v sum_n p_n z_n, with the query from f.

    Fields: `adapters`: delta/ folders of runs with method adapter, placement pfeiffer, all on this recipe's model.
    `dropout` acts on the scores; default: the model's attention dropout. `regularisation` times
    sum_layers ||I - W_v||_F^2 is added to the loss. Scores are divided by a temperature that falls linearly from
    `temperature` to 1 until progress `anneal`; it follows training steps alone.
    """

    type: Literal["fusion"] = "fusion"
    looks: ClassVar[bool] = False
    adapters: tuple[str, ...] = Field(min_length=1)
    dropout: float | None = Field(default=None, ge=0, lt=1)
    regularisation: float = Field(default=0.01, ge=0)
    temperature: float = Field(default=1.0, ge=1)
    anneal: float = Field(default=0.5, gt=0, le=1)

    def prepare(self, model: nn.Module, context: Context) -> None:
        refuse_pairs(model, "method fusion")
        saved = read_adapters(model, self.adapters, "method fusion.adapters")
        parts = anatomy(model)
        for one in saved:
            if one.invertible is not None or any(len(found) != 1 for found in one.layers):
                raise UserError(
                    f"method fusion.adapters: {one.folder!r} holds a stack or an invertible adapter; "
                    "give runs that trained one adapter a layer alone"
                )
            if one.layers[0][0].activation != saved[0].layers[0][0].activation:
                raise UserError(
                    f"method fusion.adapters: {one.folder!r} has activation {one.layers[0][0].activation!r}, "
                    f"{saved[0].folder!r} {saved[0].layers[0][0].activation!r}; give adapters of one activation"
                )
            if any(adapter.scale != 1.0 for (adapter,) in one.layers):
                raise UserError(f"method fusion.adapters: {one.folder!r} scales its adapters; give runs with scale 1")
        if any(adapter_in(model, layer) is not None for layer in parts.layers):
            raise UserError("method fusion: an earlier stage left adapters in the model; name its folder in adapters")
        Layers(top=0).prepare(model, context)
        generator = torch.Generator().manual_seed(context.seed)
        dropout = self._dropout(model)
        for layer in parts.layers:
            new = AdapterFusion.of([one.layers[layer.index][0] for one in saved], dropout, generator)
            new.annealed = self.temperature > 1
            put_after_ffn(model, layer, new.to(layer.part(layer.family.down).weight.device))  # type: ignore[arg-type]

    def _dropout(self, model: nn.Module) -> float:
        if self.dropout is not None:
            return self.dropout
        found = [getattr(model.config, name, None) for name in DROPOUTS]
        return float(next((value for value in found if value is not None), 0.0))

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], outputs: object, context: Context
    ) -> dict[str, Tensor]:
        if self.regularisation == 0:
            return {}
        penalties = torch.stack([fusion.penalty() for fusion in fusions(model)])
        return {"fusion.regularisation": self.regularisation * penalties.sum()}

    def after_step(self, model: nn.Module, progress: float) -> None:
        now = self.temperature + (1.0 - self.temperature) * ramp(progress, 0.0, self.anneal)
        for fusion in fusions(model):
            fusion.temperature.fill_(now)

    def finalize(self, model: nn.Module) -> None:
        for fusion in fusions(model):
            fusion.annealed = False

    def inputs(self) -> Sequence[str]:
        return self.adapters

    def wants(self) -> Sequence[Want]:
        return as_saved("adapters")


def fusions(model: nn.Module) -> Iterator[AdapterFusion]:
    """The model's Fusion modules, lowest layer first."""
    return (module for module in model.modules() if isinstance(module, AdapterFusion))
