"""The processes of one run (torchrun): which is the first, and what all of them agree on.

Every function does nothing, or answers for itself, where there is one process. All processes call the same ones in
the same order. Waiting and agreeing go through gloo, which sleeps: the first process may take minutes to measure.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from compressft.errors import UserError

Value = TypeVar("Value")
PATIENCE = timedelta(hours=24)
# Variables of accelerate's that ask for other things: the option, and what to do instead.
OPTIONS = {
    "ACCELERATE_USE_DEEPSPEED": ("--use_deepspeed", "shard with --use_fsdp --fsdp_version 2"),
    "ACCELERATE_USE_MEGATRON_LM": ("--use_megatron_lm", "shard with --use_fsdp --fsdp_version 2"),
    "FSDP_OFFLOAD_PARAMS": ("--fsdp_offload_params", "leave it out"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("--fsdp_activation_checkpointing", "set train.gradient_checkpointing to true"),
}
_group: list[distributed.ProcessGroup] = []
_sharded = False


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def number() -> int:
    """This process's own, from 0."""
    return distributed.get_rank() if count() > 1 else 0


def first() -> bool:
    """Whether this process writes and speaks for all."""
    return number() == 0


def sharded() -> bool:
    """Whether each holds a piece of the weights (FSDP2), not a copy of them."""
    return count() > 1 and _sharded


def shard(on: bool) -> None:
    """Whether what is trained from here on is in pieces."""
    global _sharded
    _sharded = on


def start() -> None:
    """Join the other processes where torchrun or `accelerate launch` has started several.

    The first alone goes on to use standard output. What accelerate's environment says of FSDP is taken out of it: the
    step that is sharded here is none of its models.

    Raises:
        UserError: it asks for what is not done here.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and count() == 1:
        refuse_environment(os.environ)
        shard(os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true")
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
        if not first():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process


def refuse_environment(environment: Mapping[str, str]) -> None:
    """Refuse what accelerate's environment asks for and nothing here does.

    Raises:
        UserError: which.
    """
    sharded = environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if sharded and environment.get("FSDP_VERSION", "1") != "2":
        raise UserError("accelerate launch --use_fsdp: version 1 is not done here; add --fsdp_version 2")
    for name, (option, fix) in OPTIONS.items():
        if (sharded or not name.startswith("FSDP")) and environment.get(name, "false").lower() == "true":
            raise UserError(f"accelerate launch {option}: is not done here; {fix}")


def _waiting() -> distributed.ProcessGroup:
    """The gloo group that waits and agrees."""
    if not _group:
        group = distributed.new_group(backend="gloo", timeout=PATIENCE)
        assert isinstance(group, distributed.ProcessGroup)
        _group.append(group)
    return _group[0]


def wait() -> None:
    """Go on when all processes are here."""
    if count() > 1:
        distributed.barrier(_waiting())


def shared(value: Value | None) -> Value:
    """The first process's value, which must have one, in all of them."""
    values = [value]
    if count() > 1:
        distributed.broadcast_object_list(values, src=0, group=_waiting())
    # Others give none.
    return values[0]  # type: ignore[return-value]


def gathered(value: Value) -> list[Value]:
    """Every process's value, in all of them."""
    if count() == 1:
        return [value]
    values: list[Value] = [value] * count()
    distributed.all_gather_object(values, value, group=_waiting())
    return values


def total(*values: float) -> list[float]:
    """Sums over the processes."""
    if count() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(sums, group=_waiting())
    return sums.tolist()


def widest(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The least `low` and the greatest `high` of all processes (scalars): the range of one batch over all of them."""
    if count() == 1:
        return low, high
    ends = torch.stack([-low, high])
    distributed.all_reduce(ends, distributed.ReduceOp.MAX)
    return -ends[0], ends[1]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@torch.no_grad()
def alike(model: nn.Module) -> None:
    """Give all processes the first one's parameters and buffers."""
    if count() > 1:
        for tensor in _tensors(model):
            value = tensor.detach().contiguous()
            distributed.broadcast(value, src=0)
            tensor.copy_(value)


@torch.no_grad()
def differing(model: nn.Module) -> list[str]:
    """Names of parameters and buffers whose values are not the same in all processes."""
    if count() == 1:
        return []
    named = [*model.named_parameters(), *model.named_buffers()]
    sums = torch.stack([tensor.double().sum().cpu() for _, tensor in named])
    ends = torch.cat([sums, -sums])
    distributed.all_reduce(ends, distributed.ReduceOp.MAX, group=_waiting())
    greatest, least = ends[: len(sums)], -ends[len(sums) :]
    return [
        name for (name, _), one, other in zip(named, greatest.tolist(), least.tolist(), strict=True) if one != other
    ]


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Make each of these, of one dtype, the mean of the processes' own; in place, in one message."""
    if count() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= count()
    for tensor, mean in zip(tensors, flat.split([one.numel() for one in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


@contextmanager
def same_draws(seed: int) -> Iterator[None]:
    """Inside, all processes draw the same random numbers, which depend on `seed` alone; their own go on afterwards."""
    if count() == 1:
        yield
        return
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
