"""Measure what heads and FFN neurons cost on this machine: one exported model whose layers all have another shape."""

from __future__ import annotations

import copy
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.export.cache import with_cache
from compressft.export.fold import fold
from compressft.export.fuse import fuse_qattention
from compressft.export.onnx import module_of, save, to_graph
from compressft.export.pooled import computes_first_token
from compressft.export.trace import REST, Timing, trace
from compressft.model.anatomy import Anatomy, anatomy, positions
from compressft.model.costs import CostTable, LayerCosts, monotone
from compressft.model.shrink import keep_vocabulary, resize
from compressft.modules.attention import TRAINING, register
from compressft.modules.pretrained import pretrained
from compressft.modules.quantizer import Int8Quantizer
from compressft.passes.int8 import Int8
from compressft.passes.shared.quantised import PARTS
from compressft.passes.shared.target import Target
from compressft.transform import Context
from compressft.utils.machine import default_threads, hardware
from compressft.utils.phases import doing, steps

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PretrainedConfig, PreTrainedModel

# Shapes per part, and so layers of the measured model. Exporting takes about a second per layer.
POINTS = 12
# FFN sizes are multiples of it, as pruned ones usually are.
ALIGN = 32
# Enough rows for the random ids that time a model.
VOCABULARY = 512
# Layers of the short model, and the most milliseconds that its run may differ per node from the sum of its nodes: what
# is more is another process's work.
SHORT = 2
LONGEST_GAP = 0.01


@dataclass
class Deployment:
    """How a recipe's model will run, as far as that changes its speed.

    Attributes:
        architecture, config: the model class and configuration of the uncompressed model.
        inputs: two padded rows, as the exporter traces them.
        int8: the pass that quantises it; None: fp32.
        attention, threads, rounds: as in the recipe's `export`.
        cache: whether its file takes and gives keys and values.
    """

    architecture: type[PreTrainedModel]
    config: PretrainedConfig
    inputs: Mapping[str, Tensor]
    int8: Int8 | None = field(default_factory=Int8)
    attention: str = "qattention"
    threads: int | None = None
    rounds: int = 3
    cache: bool = False


Timer = Callable[[Path, int, int, int], Timing]


def measure_table(deployment: Deployment, batch: int, length: int, timer: Timer | None = None) -> CostTable:
    """The latency table (milliseconds per run of batch x length) of this machine.

    A random model of the architecture with up to `POINTS` layers of different shapes goes through the real export; all
    parts are timed within the same runs, node by node, so that what else the machine does hits them alike. Of several
    processes the quietest counts. What tracing adds to every node, and what passes between nodes, is taken from a
    second, short model run with and without tracing: short runs find a quiet moment on a busy machine too. Costs are
    smoothed not to fall with size. A last layer that is computed for the first token alone is counted by itself: the
    first model ends in one of full size, the short one in the smallest.

    Args:
        timer: (file, batch, length, threads) -> Timing; None: onnxruntime in a process of its own.

    Raises:
        UserError: the model has fewer positions than `length`.
    """
    check_length(deployment, length)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        return time_samples(write_samples(deployment, folder), deployment, batch, length, timer or trace)


def check_length(deployment: Deployment, length: int) -> None:
    """UserError where the model has fewer positions than `length`."""
    with torch.device("meta"):
        limit = positions(_random(deployment.architecture, deployment.config))
    if limit is not None and length > limit:
        raise UserError(f"target.length: {length} is more than the model's {limit} positions; lower it")


def measure_reference(deployment: Deployment, batch: int, length: int, between: float) -> float:
    """Milliseconds of the uncompressed fp32 model as transformers exports it, measured as the table is.

    Args:
        between: what the table adds per node (its `about`).
    """
    check_length(deployment, length)
    register()
    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng(devices=[]):
        config = copy.deepcopy(deployment.config)
        model = deployment.architecture._from_config(config, attn_implementation="sdpa", dtype=torch.float32)  # type: ignore[attr-defined]
        file = Path(scratch) / "base.onnx"
        with doing("exporting the uncompressed model"):
            save(to_graph(model.eval(), deployment.inputs, tidy=False), file)
        threads = deployment.threads or default_threads()
        rounds = steps(range(deployment.rounds), "timing the uncompressed model")
        return quietest([trace(file, batch, length, threads) for _ in rounds], between)


def measure_shapes(
    deployment: Deployment, layers: Sequence[Mapping[str, int]], target: Target, between: float
) -> float:
    """Milliseconds of a whole model with layers of these shapes, exported as it will ship, measured as the reference.

    Args:
        layers: {"kv_heads", "ffn"} of each; those of 0 and 0 are not there.
        target: says at which batch and length.
        between: what the table adds per node (its `about`).
    """
    there = [layer for layer in layers if layer["kv_heads"] or layer["ffn"]]
    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng(devices=[]):
        file = Path(scratch) / "chosen.onnx"
        with doing("exporting a model of the chosen shapes"):
            model = sample_model(deployment, there)
            inputs = with_cache(model, deployment.inputs) if deployment.cache else deployment.inputs
            graph = to_graph(fold(model), inputs)
            if deployment.attention == "qattention":
                fuse_qattention(graph)
            save(graph, file)
        threads = deployment.threads or default_threads()
        rounds = steps(range(deployment.rounds), "timing the chosen shapes")
        return quietest([trace(file, target.batch, target.length, threads) for _ in rounds], between)


def quietest(rounds: Sequence[Timing], between: float) -> float:
    """Milliseconds of one run of a model that was timed several times, `between` of them per node.

    A busy machine leaves no whole run alone, but some runs of each node: their sum counts where it is less.
    """
    return min(min(one.whole, sum(_without_tracing(one, between).values())) for one in rounds)


@dataclass(frozen=True)
class Samples:
    """Exported models to time: `sample.onnx` and the short `short.onnx` in `folder`, their layers' shapes.

    `first_token`: whether their last layers are computed for the first token alone.
    """

    folder: Path
    sample: Sequence[Mapping[str, int]]
    short: Sequence[Mapping[str, int]]
    first_token: bool


def write_samples(deployment: Deployment, folder: Path) -> Samples:
    """Export both, nodes labelled by the part that they belong to."""
    # A resumed run does not measure again: its random numbers must not depend on it.
    with torch.random.fork_rng(devices=[]):
        grids = sample_shapes(deployment)
        largest = {name: max(shape[name] for shape in grids) for name in grids[0]}
        smallest = {name: min(shape[name] for shape in grids) for name in grids[0]}
        sample, short, first_token = [*grids, largest], [smallest] * SHORT, False
        for name, layers in steps((("sample", sample), ("short", short)), "exporting models to time"):
            model = sample_model(deployment, layers)
            inputs = with_cache(model, deployment.inputs) if deployment.cache else deployment.inputs
            graph = to_graph(fold(model), inputs)
            if deployment.attention == "qattention":
                fuse_qattention(graph)
            label_nodes(graph, anatomy(model))
            save(graph, folder / f"{name}.onnx")
            first_token = computes_first_token(graph)
    return Samples(folder, sample, short, first_token)


def time_samples(samples: Samples, deployment: Deployment, batch: int, length: int, timer: Timer) -> CostTable:
    """The table of exported sample models."""
    threads = deployment.threads or default_threads()
    short, rounds = [], []
    for _ in steps(range(deployment.rounds), "timing heads and neurons"):
        short.append(timer(samples.folder / "short.onnx", batch, length, threads))
        rounds.append(timer(samples.folder / "sample.onnx", batch, length, threads))
    between = min(one.whole for one in short) - min(sum(one.parts.values()) for one in short)
    between /= sum(short[0].nodes.values())
    about = {
        "unit": "milliseconds",
        "batch": batch,
        "length": length,
        "precision": "fp32" if deployment.int8 is None else "int8",
        "threads": threads,
        "rounds": [round(sum(one.parts.values()), 4) for one in rounds],
        "between_nodes": round(between, 6),
        "cpu": hardware()["cpu"],
        "onnxruntime": version("onnxruntime"),
    }
    sample, small = (min(timings, key=lambda one: sum(one.parts.values())) for timings in (rounds, short))
    return build_table(samples, sample, small, between, about)


def grid(size: int, points: int, align: int = 1) -> list[int]:
    """Up to `points` sizes from 1 (or `align`) to `size`, denser where they are small."""
    if size <= points:
        return list(range(1, size + 1))
    low = min(align, size)
    raw = [low + (size - low) * (i / (points - 1)) ** 1.6 for i in range(points)]
    return sorted({min(max(round(value / align), 1) * align, size) for value in raw[:-1]} | {size})


def sample_shapes(deployment: Deployment) -> list[dict[str, int]]:
    """Shapes of layers that have every size of both grids."""
    register()
    config = deployment.config
    probe = anatomy(_random(deployment.architecture, with_depth(config, 1))).layers[0]
    groups = grid(probe.kv_heads, POINTS)
    neurons = grid(probe.ffn, POINTS, ALIGN if probe.ffn >= ALIGN * POINTS else 1)
    depth = max(len(groups), len(neurons))
    return [{"kv_heads": groups[i % len(groups)], "ffn": neurons[-1 - i % len(neurons)]} for i in range(depth)]


def sample_model(deployment: Deployment, shapes: Sequence[Mapping[str, int]]) -> nn.Module:
    """A random model of the architecture whose layers have these shapes, quantised as it will ship."""
    register()
    config = copy.deepcopy(deployment.config)
    model = _random(deployment.architecture, with_depth(config, len(shapes)))
    resize(model, shapes)
    owner = pretrained(model)
    pad = config.pad_token_id or 0
    if owner.get_output_embeddings() is None and max(pad, VOCABULARY) < config.vocab_size and pad < VOCABULARY:
        # Looking up a row costs the same in a small table.
        keep_vocabulary(model, torch.arange(VOCABULARY))
    if deployment.int8 is not None:
        # Single modules named by their paths may not be there; what stays out in every layer counts.
        exclude = tuple(name for name in deployment.int8.exclude if name in PARTS)
        int8 = deployment.int8.model_copy(update={"exclude": exclude})
        int8.prepare(model, Context())
        for module in model.modules():
            if isinstance(module, Int8Quantizer):
                for end, value in ((module.low, -4.0), (module.high, 4.0), (module.batches, 1)):
                    end.detach().fill_(value)
        int8.finalize(model)
    return model.eval()


def with_depth(config: PretrainedConfig, depth: int) -> PretrainedConfig:
    """A copy of a configuration with this many layers."""
    values = config.to_dict()
    for name in ("layer_types", "mlp_layer_types"):
        kinds = values.get(name)
        if kinds:
            values[name] = [kinds[i % len(kinds)] for i in range(depth)]
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return type(config).from_dict({**values, name: depth})


def _random(architecture: type[PreTrainedModel], config: PretrainedConfig) -> nn.Module:
    return architecture._from_config(config, attn_implementation=TRAINING, dtype=torch.float32).eval()


def label_nodes(graph: ir.Model, parts: Anatomy) -> None:
    """Name every node "LABEL|...": "3.attention", "3.ffn" or "3.layer" by the module that it came from, else "rest"."""
    family = parts.family
    kinds = {path.split(".")[0]: "attention" for path in (family.attention, family.o)}
    kinds |= {path.split(".")[0]: "ffn" for path in (*family.up, family.down)}
    roots = {layer.name: layer.index for layer in parts.layers}
    for number, node in enumerate(graph.graph):
        label = REST
        module = module_of(node.name or "")
        root = next((name for name in roots if f"{module}.".startswith(f"{name}.")), None)
        if root is not None:
            first = module[len(root) + 1 :].split(".")[0]
            label = f"{roots[root]}.{kinds.get(first, 'layer')}"
        node.name = f"{label}|{number}"


def build_table(samples: Samples, sample: Timing, short: Timing, between: float, about: dict[str, object]) -> CostTable:
    """The table of the timed models; `between` milliseconds (or less than 0) per node."""
    costs = [_without_tracing(timing, between) for timing in (sample, short)]
    layers = list(enumerate(samples.sample))
    if not samples.first_token:
        return CostTable(**_costs([(costs[0], layers)]), rest=costs[0].get(REST, 0.0), about=about)
    ends = [(costs[0], layers[-1:]), (costs[1], list(enumerate(samples.short))[-1:])]
    last = LayerCosts(**_costs(ends))
    return CostTable(**_costs([(costs[0], layers[:-1])]), last=last, rest=costs[0].get(REST, 0.0), about=about)


def _without_tracing(timing: Timing, between: float) -> dict[str, float]:
    between = min(max(between, -LONGEST_GAP), LONGEST_GAP)
    # What tracing adds differs a little between nodes: no part is taken for free.
    return {label: max(ms + between * timing.nodes[label], 0.1 * ms) for label, ms in timing.parts.items()}


def _costs(timed: Sequence[tuple[Mapping[str, float], Sequence[tuple[int, Mapping[str, int]]]]]) -> dict[str, Any]:
    """The fields of `LayerCosts`, from the costs by label of some layers (index, shape) of each timed model."""
    found: dict[str, Any] = {}
    for kind, name, sizes in (("attention", "kv_heads", "groups"), ("ffn", "ffn", "neurons")):
        seen: dict[int, list[float]] = defaultdict(list)
        for costs, layers in timed:
            for index, shape in layers:
                seen[shape[name]].append(costs[f"{index}.{kind}"])
        found[sizes] = tuple(sorted(seen))
        found[kind] = tuple(monotone([float(np.mean(seen[size])) for size in found[sizes]]))
    besides = [costs.get(f"{index}.layer", 0.0) for costs, layers in timed for index, _ in layers]
    return {**found, "layer": float(np.mean(besides))}
