"""LSH attention (Reformer): queries that are keys too see those that random rotations put into their bucket."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressft.modules.dense_attention import Call
from compressft.modules.dropout import drop
from compressft.modules.kinds import Extra, built, known
from compressft.utils.texts import JSON

# Added to nothing: these stand in place of a product. A query sees itself only where it sees nobody else.
MASKED, ITSELF = -1e9, -1e5


def without_cache(model: nn.Module) -> None:
    """Let `model` generate without a cache: keys that are queries cannot be kept from step to step."""
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            config.use_cache = False  # type: ignore[union-attr]


@dataclass(frozen=True)
class Hashing:
    """How an attention's queries are hashed, in `rounds` of so many `buckets`, and cut into chunks."""

    head_dim: int
    buckets: int
    rounds: int
    chunk: int
    look_back: int


@known
class Lsh(Extra):
    """What an attention module's child `lsh` is: the settings of `lsh_attention`, and its rotations.

    Buffer `rotations` (1, rounds, head_dim, buckets / 2) fp32: drawn once, so that a forward that is computed again,
    and every later one, hashes alike. All heads share them.

    Raises:
        ValueError: `forward` is given another number of keys than queries (a cache), or a mask that is no boolean.
    """

    kind: ClassVar[str] = "lsh"
    rotations: Tensor

    def __init__(self, hashing: Hashing, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.chunk = hashing.chunk
        self.look_back = hashing.look_back
        generator = generator or torch.Generator().manual_seed(0)
        shape = (1, hashing.rounds, hashing.head_dim, hashing.buckets // 2)
        self.register_buffer("rotations", torch.randn(shape, generator=generator))

    def describe(self) -> dict[str, JSON]:
        _, rounds, head_dim, half = self.rotations.shape
        return asdict(Hashing(head_dim, 2 * half, rounds, self.chunk, self.look_back))

    @classmethod
    def rebuild(cls, old: nn.Module | None, entry: Mapping[str, JSON]) -> Lsh:
        return cls(built(Hashing, entry))

    def forward(self, module: nn.Module, call: Call) -> tuple[Tensor, None]:
        """The result is that of `compressft.modules.attention.attention`; the call's keys are not used."""
        query, key, value, mask, options = call
        if key.shape[2] != query.shape[2]:
            raise ValueError("lsh_attention: a cache keeps no queries, which are the keys here; set use_cache to False")
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError("lsh_attention: attention with a bias on its scores is not supported")
        is_causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        sight = Sight(self.chunk, self.look_back, causal, not causal, dropout=options.get("dropout", 0.0))
        return lsh_attention(query, value, self.rotations, sight, mask).transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Sight:
    """Who sees whom, once the tokens are hashed.

    Attributes:
        chunk: tokens of a chunk, which see each other.
        look_back: chunks before it that a chunk sees.
        causal: nobody sees a later place.
        across_buckets: tokens of a chunk see each other across buckets.
        correct_duplicates: a key that a query sees in several rounds counts once.
        dropout: on the probabilities.
    """

    chunk: int
    look_back: int = 1
    causal: bool = False
    across_buckets: bool = True
    correct_duplicates: bool = True
    dropout: float = 0.0


def lsh_attention(qk: Tensor, value: Tensor, rotations: Tensor, sight: Sight, mask: Tensor | None = None) -> Tensor:
    """Attention of Kitaev, Kaiser & Levskaya, "Reformer: The Efficient Transformer" (ICLR 2020), section 2.

    In each round a token's bucket is argmax([xR, -xR]). Tokens are sorted by bucket, then place, and cut into chunks; a
    chunk sees itself and the `look_back` chunks before it (the first ones see fewer: nothing wraps around). Products
    are q . k with k = q / |q|, as in the authors' code (no further factor). A token sees itself only where it sees
    nobody else. Rounds are added up as exp(logsumexp) says; a key that a query sees in n rounds counts once
    (`correct_duplicates`: log n is subtracted, equation 5), so that the result is a softmax over the union.

    `across_buckets` false: nobody in another bucket is seen. Then a causal query sees the `look_back * chunk` tokens
    before it in its own bucket, wherever chunks begin: which ones does not depend on later tokens, as it does
    otherwise (in the authors' code too), where tokens to come can move the borders of chunks.

    Args:
        qk: (B, H, T, D), queries and keys at once.
        value: (B, H, T, D).
        rotations: (1 or H, rounds, D, buckets / 2), what hashes.
        mask: (B or 1, 1, T, T) bool, who may be seen by whom; tokens that nobody may see take part in no bucket.

    Returns:
        (B, H, T, D) in the dtype of `value`.
    """
    chunk, look_back = sight.chunk, sight.look_back
    length = qk.shape[2]
    rounds = rotations.shape[1]
    extra = -length % chunk
    whole = length + extra
    buckets = F.pad(hash_buckets(qk, rotations, seen_by_any(mask)), (0, extra), value=2 * rotations.shape[-1] + 1)
    place = torch.arange(whole, device=qk.device)
    # Of equal buckets the earlier place comes first.
    order = (buckets * whole + place).argsort(-1)
    rank = order.argsort(-1)

    def in_chunks(x: Tensor) -> Tensor:
        """(B, H, T, D) -> (B, H, rounds, chunks, chunk, D), sorted."""
        x = F.pad(x, (0, 0, 0, extra))[:, :, None].expand(-1, -1, rounds, -1, -1)
        return x.gather(3, order[..., None].expand(-1, -1, -1, -1, x.shape[-1])).unflatten(3, (-1, chunk))

    queries = in_chunks(qk)
    keys = _with_earlier(in_chunks(unit(qk)), look_back)
    who = order.unflatten(3, (-1, chunk))[..., None]
    whom = _with_earlier(who, look_back, fill=-1).transpose(-1, -2)

    def near(number: int | slice) -> Tensor:
        """Whether the hashing of one round, or of each for itself, lets `who` see `whom`."""
        ranks, found = rank[:, :, number], buckets[:, :, number]
        if isinstance(number, int):
            ranks, found = (x[:, :, None].expand(-1, -1, rounds, -1) for x in (ranks, found))
        (rank_q, rank_k), (bucket_q, bucket_k) = (
            [x.gather(3, i.clamp(min=0).flatten(3)).view(i.shape) for i in (who, whom)] for x in (ranks, found)
        )
        if sight.causal and not sight.across_buckets:
            return (bucket_q == bucket_k) & (rank_q - rank_k <= look_back * chunk)
        apart = rank_q // chunk - rank_k // chunk
        close = (apart >= 0) & (apart <= look_back)
        return close if sight.across_buckets else close & (bucket_q == bucket_k)

    allowed = (whom >= 0) & (whom < length) & near(slice(None))
    if sight.causal:
        allowed = allowed & (whom <= who)
    if mask is not None:
        allowed = allowed & _at(mask, who, whom)
    products = _exact(queries @ keys.transpose(-1, -2))
    products = products.masked_fill(~allowed, MASKED).masked_fill(who == whom, ITSELF)
    if sight.correct_duplicates and rounds > 1:
        times = sum(near(number).to(products.dtype) for number in range(rounds))
        products = products - torch.as_tensor(times).clamp(min=1.0).log()
    total = products.logsumexp(-1, keepdim=True)
    shares = drop((products - total).exp(), sight.dropout)
    out = shares.to(value.dtype) @ _with_earlier(in_chunks(value), look_back)
    out, total = (x.flatten(3, 4).gather(3, rank[..., None].expand(-1, -1, -1, -1, x.shape[-1])) for x in (out, total))
    weights = total.softmax(2).to(out.dtype)
    return (out * weights).sum(2)[:, :, :length]


@torch.no_grad()
def hash_buckets(qk: Tensor, rotations: Tensor, real: Tensor | None = None) -> Tensor:
    """Bucket of every token in every round, int64 (B, H, rounds, T); the last number is of tokens that are not `real`.

    Args:
        qk: (B, H, T, D).
        rotations: (1 or H, rounds, D, buckets / 2).
        real: (B or 1, T) bool.
    """
    with torch.autocast(qk.device.type, enabled=False):
        rotated = qk.detach().to(rotations.dtype)[:, :, None] @ rotations
    found = torch.cat([rotated, -rotated], dim=-1).argmax(-1)
    return found if real is None else found.masked_fill(~real[:, None, None], 2 * rotations.shape[-1])


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension; 1e-6 is added to the mean of the squares, as the authors do."""
    scale = torch.rsqrt(_exact(x).square().mean(-1, keepdim=True) + 1e-6) * x.shape[-1] ** -0.5
    return x * scale.to(x.dtype)


def _exact(x: Tensor) -> Tensor:
    """At least in fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def seen_by_any(mask: Tensor | None) -> Tensor | None:
    """Tokens that somebody else, or they themselves, may see: (B or 1, T); None where there is no mask."""
    return None if mask is None else mask[:, 0].any(1)


def _with_earlier(x: Tensor, look_back: int, fill: int = 0) -> Tensor:
    """(..., chunks, chunk, D) -> (..., chunks, (look_back + 1) * chunk, D): each chunk behind those before it."""
    chunks = x.shape[-3]
    padded = F.pad(x, (0, 0, 0, 0, look_back, 0), value=fill)
    return torch.cat([padded[..., i : i + chunks, :, :] for i in range(look_back + 1)], dim=-2)


def _at(mask: Tensor, who: Tensor, whom: Tensor) -> Tensor:
    """Entries of a mask (B or 1, 1, T, T) at pairs of places; places behind the row's end give any entry."""
    length = mask.shape[-1]
    pairs = who.clamp(max=length - 1) * length + whom.clamp(0, length - 1)
    flat = mask.expand(len(who), -1, -1, -1).flatten(1)
    return flat.gather(1, pairs.flatten(1)).view(pairs.shape)


__all__ = ["Hashing", "Lsh", "Sight", "hash_buckets", "lsh_attention", "unit"]
