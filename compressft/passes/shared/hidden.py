"""Put a gate on the dimensions of the residual stream into a model, and take it out again."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.model.anatomy import anatomy, stream
from compressft.model.shrink import narrow
from compressft.model.surgery import compress_linear, replace
from compressft.modules.bottleneck import BottleneckLayers
from compressft.modules.embedding import CompressedEmbedding
from compressft.modules.gate import GroupGate
from compressft.modules.linear import CompressedLinear
from compressft.modules.norm import GatedNorm
from compressft.modules.part_gate import StreamMask, unhook


def gate_stream(model: nn.Module, gate: GroupGate, name: str) -> None:
    """Let every norm of the stream work on live dimensions, and every reader with whole rows see only those.

    Every reader stands behind a norm that writes 0 to dead dimensions (or behind the gated projection), so what the
    stream carries there never matters.

    Args:
        gate: registered in the model by the caller.
        name: key of the gates in CompressedLinear slots.
    """
    flow = stream(model)
    parts = anatomy(model)
    mask = StreamMask(gate)
    for path in flow.norms:
        replace(model, path, GatedNorm.of(model.get_submodule(path), gate))
    if flow.projection:
        compress_linear(model, flow.projection).register_forward_hook(mask.on_output)
    quantised = [f"{layer.name}.{path}" for layer in parts.layers for path in (*layer.projections, *layer.family.up)]
    quantised += [path for path in flow.reads if parts.family.pooler and path.endswith(f"{parts.family.pooler}.dense")]
    for path in quantised:
        compress_linear(model, path).gates[name] = StreamMask(gate)
    inside_norms = {id(m.adapter) for m in model.modules() if isinstance(m, GatedNorm)}
    for module in model.modules():
        if isinstance(module, BottleneckLayers) and id(module) not in inside_norms:
            module.register_forward_pre_hook(mask.on_input, with_kwargs=True)


def gate_tables(model: nn.Module, gate: GroupGate) -> None:
    """Tell quantised embedding tables which columns count; again and again, as others may put them in later."""
    for path in stream(model).tables:
        table = model.get_submodule(path)
        if isinstance(table, CompressedEmbedding) and table.columns is None:
            table.columns = StreamMask(gate).columns


def ungate_stream(model: nn.Module, gate: GroupGate, name: str) -> None:
    """Fold the gate's factors into norms and projection and remove everything that `gate_stream` put in."""
    flow = stream(model)
    if flow.projection:
        _scale_rows(model.get_submodule(flow.projection), gate)
    for path in flow.norms:
        norm = model.get_submodule(path)
        assert isinstance(norm, GatedNorm)
        replace(model, path, norm.restore())
    for path in flow.tables:
        table = model.get_submodule(path)
        if isinstance(table, CompressedEmbedding):
            table.columns = None
    for module in model.modules():
        if isinstance(module, CompressedLinear) and isinstance(dict(module.gates.items()).get(name), StreamMask):
            module.fold(name)
        unhook(module, StreamMask)


@torch.no_grad()
def _scale_rows(linear: nn.Module, gate: GroupGate) -> None:
    assert isinstance(linear, nn.Linear)
    factor = gate.columns()
    linear.weight.data = linear.weight * factor[:, None]
    if linear.bias is not None:
        linear.bias.data = linear.bias * factor


def check_narrow(model: nn.Module, who: str) -> None:
    """Cut one dimension from a copy without values and run it: what would fail at the end fails now.

    Raises:
        UserError: something in the model needs the full width and is not known to read or write the stream.
    """
    memo: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        moved = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
    trial = copy.deepcopy(model, memo).eval()
    for module in trial.modules():
        if isinstance(module, CompressedLinear):
            # By the time of the cut these are settled.
            module.gates.clear()
            module.delta = module.quantizer = None
            if module.store is not None:
                module.store = None
                module.weight = nn.Parameter(torch.empty(module.out_features, module.in_features, device="meta"))
    ids = torch.ones(2, 4, dtype=torch.int64, device="meta")
    # A ready mask is taken as it is; of a padding mask transformers would want to see the values.
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool, device="meta")
    try:
        narrow(trial, torch.arange(anatomy(trial).width - 1))
        with torch.no_grad():
            trial(input_ids=ids, attention_mask=mask)
    except (RuntimeError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"{who}: {type(model).__name__} cannot be made narrower: {line}; set it to 0") from error
