"""Prefixes: trained keys and values in front of an attention's own, and the attention over both."""

from __future__ import annotations

from contextlib import nullcontext
from typing import ClassVar

import torch
from compressft_kernels import dispatch, prefix_attention
from compressft_kernels.reference.operands import autocast_dtype
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from compressft.modules.dense_attention import Call, Options, attend
from compressft.modules.dropout import drop
from compressft.modules.kinds import Extra, known
from compressft.utils.texts import JSON


class Front(Extra):
    """What an attention module's child `prefix` is: calling it gives key and value, (Hkv, P, D) each, in fp32.

    `dropout` acts on them while training, another draw for every row of the batch.
    """

    dropout: float = 0.0

    def joined(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The prefix in front of keys and values (B, Hkv, S, D): (B, Hkv, P + S, D)."""
        pairs = zip(self(), (key, value), strict=True)
        fronts = ((front.to(own.dtype).expand(own.shape[0], -1, -1, -1), own) for front, own in pairs)
        key, value = (torch.cat([self._dropped(front), own], dim=2) for front, own in fronts)
        return key, value

    def _dropped(self, front: Tensor) -> Tensor:
        return drop(front, self.dropout) if self.drops else front

    @property
    def drops(self) -> bool:
        """Whether dropout acts now."""
        return self.training and self.dropout > 0.0


@known
class Prefix(Front):
    """The keys and values themselves: what ships, and what is trained without reparameterisation.

    Parameters `key` and `value` (heads, length, size), with the KV heads of a grouped-query model.
    """

    kind: ClassVar[str] = "prefix"

    def __init__(self, heads: int, length: int, size: int) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.empty(heads, length, size))
        self.value = nn.Parameter(torch.empty(heads, length, size))

    @classmethod
    def of(cls, key: Tensor, value: Tensor) -> Prefix:
        """With copies of these values."""
        new = cls(*key.shape)
        new.key, new.value = nn.Parameter(key.detach().clone()), nn.Parameter(value.detach().clone())
        return new

    def describe(self) -> dict[str, JSON]:
        heads, length, size = self.key.shape
        return {"heads": heads, "length": length, "size": size}

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.key, self.value

    def keep(self, heads: Tensor) -> None:
        """Only these KV heads stay (int64, ascending)."""
        for name, parameter in list(self.named_parameters()):
            kept = parameter.detach().index_select(0, heads.to(parameter.device))
            setattr(self, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))


class Table(nn.Module):
    """The part of the reparameterisation that all layers share: tanh(E W^T + b), E (P, d), W (hidden, d)."""

    def __init__(self, length: int, width: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(length, width, generator=generator))
        self.weight, self.bias = _linear(width, hidden, generator)

    def forward(self) -> Tensor:
        """(P, hidden)."""
        return torch.tanh(F.linear(self.table, self.weight, self.bias))


@known
class ReparameterisedPrefix(Front):
    """Keys and values as a layer's own linear map of the shared `Table` (Li & Liang 2021, section 4.3).

    The paper has one output layer for all transformer layers; its rows of this layer, keys before values, are the
    parameters `weight` (2 * heads * size, hidden) and `bias`. The table is registered elsewhere, once.
    """

    kind: ClassVar[str] = "reparameterised_prefix"

    def __init__(self, heads: int, size: int, table: Table, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = (2, heads, size)
        # In a tuple: a tensor under several names would be refused where checkpoints are written.
        self.table = (table,)
        self.weight, self.bias = _linear(table.weight.shape[0], 2 * heads * size, generator)

    def describe(self) -> dict[str, JSON]:
        """Folders hold settled prefixes alone."""
        raise ValueError("prefix: is still reparameterised; call the transforms' finalize first")

    def forward(self) -> tuple[Tensor, Tensor]:
        device = self.weight.device.type
        # In fp32 also under autocast: these are the values that ship.
        plain = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
        with plain:
            rows = F.linear(self.table[0](), self.weight, self.bias)
        key, value = rows.unflatten(1, self.shape).permute(1, 2, 0, 3)
        return key, value

    def settled(self) -> Prefix:
        """The keys and values that it gives now."""
        return Prefix.of(*self())


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of a linear layer, initialised as torch does: uniform within 1 / sqrt(inputs)."""
    bound = inputs**-0.5
    weight = torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(outputs).uniform_(-bound, bound, generator=generator)
    return nn.Parameter(weight), nn.Parameter(bias)


def attention_with_prefix(prefix: Front, module: nn.Module, call: Call) -> tuple[Tensor, None]:
    """softmax over the prefix's and the row's own keys; every query sees the whole prefix.

    The result is that of `compressft.modules.attention.attention`. The kernel `prefix_attention` takes what it can
    express where it runs: no dropout, no bias, and no mask or one of paddings on the right alone. All else is SDPA over
    the joined keys.

    Raises:
        ValueError: a paged cache, whose keys are not here.
    """
    query, options = call.query, call.options
    if options.get("cache") is not None:
        raise ValueError("prefix: attention over a paged cache does not know it; generate without continuous batching")
    queries, position_bias, is_causal = query.shape[2], options.get("position_bias"), options.get("is_causal")
    causal = (getattr(module, "is_causal", True) if is_causal is None else is_causal) and queries > 1
    by_position = call.mask is None and causal
    if by_position:
        # Without a mask the first query is at the first key: what follows are empty places of a static cache.
        call = call._replace(key=call.key[:, :, :queries], value=call.value[:, :, :queries])
    if options.get("dropout", 0.0) == 0.0 and position_bias is None and not prefix.drops and kernel_runs(query):
        o = _by_kernel(prefix, call, causal)
        if o is not None:
            return o.transpose(1, 2).contiguous(), None
    own, mask = call.key.shape[2], call.mask
    key, value = prefix.joined(call.key, call.value)
    length = key.shape[2] - own
    if by_position:
        mask = query.new_ones(1, 1, queries, length + own, dtype=torch.bool).tril(length)
    elif mask is not None:
        # 1 lets see in a boolean mask, 0 changes nothing in one that is added.
        mask = _in_front(mask, length, float(mask.dtype == torch.bool))
    if position_bias is not None:
        position_bias = _in_front(position_bias, length, 0.0)
    joined: Options = {**options, "is_causal": False, "position_bias": position_bias}
    return attend(module, query, key, value, mask, **joined)


def _by_kernel(prefix: Front, call: Call, causal: bool) -> Tensor | None:
    """(B, Hq, T, D); None where the mask is more than the kernel can be told."""
    query, key, value, mask, options = call
    lengths = None
    if mask is not None:
        lengths = right_padding(mask, causal)
        if lengths is None:
            return None
        lengths = lengths.expand(len(query))
    scale = options.get("scaling")
    return prefix_attention(query, key, value, *prefix(), causal=causal, lengths=lengths, scale=scale)


def _in_front(x: Tensor, columns: int, fill: float) -> Tensor:
    """(..., S) -> (..., columns + S)."""
    return torch.cat([x.new_full((*x.shape[:-1], columns), fill), x], dim=-1)


def kernel_runs(query: Tensor) -> bool:
    """Whether `prefix_attention` has a kernel for these queries here."""
    dtype = autocast_dtype(query) or query.dtype
    return dispatch.runs_triton("prefix_attention", query, dtype, head_dim=query.shape[3])


# A mask is the same tensor in all layers: it is read once. Mask -> (its version, causal, the answer).
_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def right_padding(mask: Tensor, causal: bool) -> Tensor | None:
    """How many own keys each row has, (B,) int64, where a mask says nothing but that (and causality); else None.

    Args:
        mask: (B or 1, 1, T, S); a boolean one says who is seen.
        causal: query t must see no key behind S - T + t.
    """
    if mask.dtype != torch.bool or mask.shape[1] != 1 or torch.compiler.is_compiling():
        return None
    found = _read.get(mask)
    if found is None or found[:2] != (mask._version, causal):
        rows, _, queries, keys = mask.shape
        lengths = mask[:, 0, -1].sum(-1)
        position = torch.arange(keys, device=mask.device)
        seen = position < lengths.view(-1, 1, 1)
        if causal:
            seen = seen & (position <= torch.arange(keys - queries, keys, device=mask.device)[:, None])
        same = torch.equal(mask[:, 0], seen.expand(rows, queries, keys))
        found = _read[mask] = (mask._version, causal, lengths if same else None)
    return found[2]
