"""Prefix-tuning: trained keys and values in front of every layer's own, the model frozen (Li & Liang 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.methods.layers import Layers
from compressft.model.anatomy import Layer, anatomy, linear_shape, positions
from compressft.model.surgery import replace
from compressft.modules.attention import TRAINING, Recorder, prefix_of, recording
from compressft.modules.embedding import CompressedEmbedding
from compressft.modules.prefix import Front, Prefix, ReparameterisedPrefix, Table
from compressft.modules.pretrained import pretrained
from compressft.transform import Context, Transform

TABLES = "prefix_tables"
FIT_RATE = 1e-4


@dataclass(frozen=True)
class Site:
    """One attention that gets a prefix: self-attention of a stack, or the decoder's attention to the encoder."""

    kind: str
    module: nn.Module
    heads: int
    size: int


class PrefixTuning(Transform):
    """Li & Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation" (ACL 2021).

    Every attention gets `length` trained keys and values that all queries see. They are tanh(E W1^T + b1) W2^T + b2
    while training, with a table E (P, d), W1 (hidden, d) and one W2 over all layers; afterwards only keys and values
    are kept, 2 * layers * P * KV heads * head_dim numbers. Prefix and a new task's head are trained, nothing else: a
    language model's output layer stays frozen. Encoder-decoders get three prefixes, each with a table of its own: the
    encoder's and decoder's self-attention, and cross-attention.

    Fields: `length` P: 10 as for table-to-text generation in the paper (its summarisation takes 200). `reparameterise`
    false trains keys and values themselves. `hidden`: width of the reparameterisation, 512 in the authors' code (800
    for BART). `dropout` acts on keys and values. `initial`: "random", or real words (a text, or a list of words) whose
    activations are the first keys and values, best with little data; they are repeated or cut to P tokens. The
    reparameterisation is fitted to them by `fit_steps` steps of Adam(1e-4).

    `shift_positions`: real tokens take their place in a table of positions behind the prefix, from P on, as in the
    authors' GPT-2; null means so in decoders with such a table. Encoders see a row's first token always at place 0 in
    pretraining, and their rows may need the whole table, so they are not shifted. Rotary and relative positions need
    no shift: they act on a query's distance to the row's own keys, and the prefix is learned as it stands there.
    """

    type: Literal["prefix"] = "prefix"
    length: int = Field(default=10, ge=1)
    reparameterise: bool = True
    hidden: int = Field(default=512, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    initial: str | tuple[str, ...] = "random"
    fit_steps: int = Field(default=500, ge=0)
    shift_positions: bool | None = None

    def prepare(self, model: nn.Module, context: Context) -> None:
        self._check(model)
        shifted = self._shifts(model, context)
        Layers(top=0).prepare(model, context)
        # A model without values is there to be counted.
        counted = next(model.parameters()).device.type == "meta"
        wanted = None if self.initial == "random" or counted else self._activations(model, context)
        fronts = self._attach(model, torch.Generator().manual_seed(context.seed), wanted)
        if wanted is not None and self.reparameterise:
            _fit(fronts, wanted, self.fit_steps)
        if shifted is not None:
            table = model.get_submodule(shifted)
            assert isinstance(table, nn.Embedding)
            if not isinstance(table, CompressedEmbedding):
                table = CompressedEmbedding.of(table, bits=None)
                replace(model, shifted, table)
            table.first = self.length

    def _check(self, model: nn.Module) -> None:
        implementation = pretrained(model).config._attn_implementation
        if implementation != TRAINING:
            raise UserError(
                f"method prefix: the model's attention is {implementation!r}, which knows no prefix; "
                "load it with compressft's load_model"
            )
        if any(prefix_of(site.module) is not None for site in sites(model)):
            raise UserError(
                "method prefix: the model has a prefix already; start from a model without one, or train it on with "
                "method full"
            )

    def _shifts(self, model: nn.Module, context: Context) -> str | None:
        """Path of the table of positions that real tokens look up from P on, None where they are not shifted."""
        parts = anatomy(model)
        path = parts.family.positions
        if path is None:
            if self.shift_positions:
                kind = pretrained(model).config.model_type
                raise UserError(f"method prefix.shift_positions: {kind} has no table of positions to shift in; drop it")
            return None
        if not (parts.family.causal if self.shift_positions is None else self.shift_positions):
            return None
        places = positions(model)
        assert places is not None
        longest = 1 if context.data is None else context.data.longest
        if self.length + longest > places:
            raise UserError(
                f"method prefix.length: {self.length} and rows of {longest} tokens are more than the model's {places} "
                "positions; lower length or data.max_length, or set shift_positions to false"
            )
        return parts.path(path)

    def _attach(
        self, model: nn.Module, generator: torch.Generator, wanted: list[tuple[Tensor, Tensor]] | None
    ) -> list[Front]:
        """Give every site its prefix; in the order of `sites`."""
        parts = anatomy(model)
        tables = nn.ModuleDict()
        fronts: list[Front] = []
        for number, site in enumerate(sites(model)):
            if self.reparameterise:
                if site.kind not in tables:
                    tables[site.kind] = Table(self.length, parts.width, self.hidden, generator)
                table = tables[site.kind]
                assert isinstance(table, Table)
                front: Front = ReparameterisedPrefix(site.heads, site.size, table, generator)
            elif wanted is None:
                shape = (2, site.heads, self.length, site.size)
                front = Prefix.of(*torch.randn(shape, generator=generator))
            else:
                front = Prefix.of(*wanted[number])
            front.dropout = self.dropout
            device = next(site.module.parameters()).device
            site.module.add_module("prefix", front.to(device).train(site.module.training))
            fronts.append(front)
        if len(tables):
            parts.backbone.add_module(TABLES, tables.to(next(model.parameters()).device))
        return fronts

    @torch.no_grad()
    def _activations(self, model: nn.Module, context: Context) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (Hkv, P, D) of the words at every site, as attention is given them."""
        if context.data is None:
            raise UserError("method prefix.initial: words need the stage's tokenizer; run it in a recipe's stage")
        text = self.initial if isinstance(self.initial, str) else " ".join(self.initial)
        ids = context.data.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError(f'method prefix.initial: {text!r} has no tokens; give words, or "random"')
        device = next(model.parameters()).device
        parts = anatomy(model)
        if parts.family.decoder is not None:
            raise UserError('method prefix.initial: words are for a single stack of layers; leave it at "random"')
        row = torch.tensor([ids[i % len(ids)] for i in range(self.length)], device=device)[None]
        places = {}
        if parts.family.causal and parts.family.positions is None:
            # Right before the first real token's place, so that the prefix acts as these words in front of it.
            places["position_ids"] = torch.arange(-self.length, 0, device=device)[None]
        recorder = Recorder({site.module: number for number, site in enumerate(sites(model))})
        was_training = model.training
        model.eval()
        with recording(recorder):
            parts.backbone(input_ids=row, attention_mask=torch.ones_like(row), **places)
        model.train(was_training)
        return [(recorder.taken[n].key[0], recorder.taken[n].value[0]) for n in range(len(recorder.taken))]

    @torch.no_grad()
    def finalize(self, model: nn.Module) -> None:
        for site in sites(model):
            front = prefix_of(site.module)
            if isinstance(front, ReparameterisedPrefix):
                site.module.add_module("prefix", front.settled())
            elif front is not None:
                front.dropout = 0.0
        backbone = anatomy(model).backbone
        if hasattr(backbone, TABLES):
            delattr(backbone, TABLES)


def sites(model: nn.Module) -> Iterator[Site]:
    """Every attention of the model, layer by layer; cross-attention after its layer's own."""
    for layer in anatomy(model).layers:
        yield Site("decoder" if layer.family.causal else "encoder", *_shape(layer, layer.family.attention))
        if layer.family.cross is not None:
            yield Site("cross", *_shape(layer, layer.family.cross))


def _shape(layer: Layer, path: str) -> tuple[nn.Module, int, int]:
    """An attention module, its KV heads and their size."""
    heads = layer.kv_heads
    if path == layer.family.cross:
        heads = linear_shape(layer.part(layer.family.cross_linears[1]))[1] // layer.head_dim
    return layer.part(path), heads, layer.head_dim


def _fit(fronts: list[Front], wanted: list[tuple[Tensor, Tensor]], steps: int) -> None:
    """Fit the reparameterisation to activations by mean squared error."""
    parameters = {id(p): p for front in fronts for p in front.parameters()}
    parameters |= {id(p): p for front in fronts for table in getattr(front, "table", ()) for p in table.parameters()}
    optimiser = torch.optim.Adam(parameters.values(), lr=FIT_RATE)
    target = torch.stack([torch.stack(pair) for pair in wanted])
    with torch.enable_grad():
        for _ in range(steps):
            optimiser.zero_grad()
            given = torch.stack([torch.stack(front()) for front in fronts])
            nn.functional.mse_loss(given, target).backward()
            optimiser.step()
    optimiser.zero_grad()


__all__ = ["PrefixTuning"]
