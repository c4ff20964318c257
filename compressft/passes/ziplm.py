"""ZipLM: before training, remove the heads and neurons that a latency or size target cannot afford, and compensate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar, Literal, NoReturn

import torch
from pydantic import Field
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.model.anatomy import Layer, anatomy
from compressft.model.shrink import drop_layers, shrink
from compressft.passes.shared.calibrate import moments
from compressft.passes.shared.choice import Trial, best, choose, sizes_allowed, tried
from compressft.passes.shared.prunable import Prunable, Shift, model_losses, skipped
from compressft.passes.shared.target import Target, cost_table
from compressft.transform import REMOVES, Claim, Context, Resource, Transform
from compressft.utils.phases import steps

# For `measure` "model": one in four of the calibration set's batches, two at most.
SHIFT_SHARE, SHIFT_BATCHES = 4, 2


class ZipLM(Transform):
    """Choose every layer's heads and FFN neurons for a target, remove them at once, train what is left.

    Kurtic, Frantar & Alistarh, "ZipLM: Inference-Aware Structured Pruning of Language Models" (2023). In each layer
    the structures go one at a time in the order of their Optimal Brain Surgeon score (`passes.obs`), a KV group with
    all its query heads; the remaining weights, and the bias, take over what they can. The sizes that lose least within
    the target come from `choice.choose`. Where it is a time, a model of these sizes is measured, and they are chosen
    again by what it takes: parts that are timed one by one do not quite add up to a whole. The model is smaller from
    the first step on, so steps are faster too.

    Fields: `target`: see `Target`, `{latency_ms: 3.0}`, `{speedup: 4}`, `{parameters: 0.3}`, `{bytes: 8000000}` or
    `{sparsity: 0.8}`. `rows`: training rows in the calibration set. `align`: FFN sizes are multiples of it.
    `floor_heads` (KV groups), `floor_ffn`: the least a layer keeps. `layers`: whole layers may go. `damping`: added to
    the second moments' diagonal, relative to its mean. `measure` "layer" weighs a part by the relative squared error of
    its own output, as the paper does before its search; "model" by how far the model's last hidden states move when
    this part alone shrinks, which replaces that search: a large relative error in one layer may be nothing in another.

    Gradual pruning, the paper's way to high speedups, is a recipe with a stage per target, each from the weights of
    the one before; targets always count from the recipe's model:

        stages:
          - {name: dense}
          - name: x2
            passes: [{type: ziplm, target: {speedup: 2}}]
            objectives: [{type: distill, teacher: dense, hidden: 1.0}]
          - name: x4
            passes: [{type: ziplm, target: {speedup: 4}}, int8]
            objectives: [{type: distill, teacher: dense, hidden: 1.0}]
    """

    type: Literal["ziplm"] = "ziplm"
    order: ClassVar[int] = REMOVES
    gives: ClassVar[Sequence[Resource]] = (Resource.STARTING_LAYERS,)
    target: Target
    rows: int = Field(default=512, ge=1)
    align: int = Field(default=32, ge=1)
    floor_heads: int = Field(default=1, ge=1)
    floor_ffn: int = Field(default=32, ge=1)
    layers: bool = False
    damping: float = Field(default=0.01, gt=0)
    measure: Literal["model", "layer"] = "model"

    def prepare(self, model: nn.Module, context: Context) -> None:
        layers = anatomy(model).layers
        batches = context.calibration(self.rows, "pass ziplm")
        parts = self._parts(model, layers, batches)
        # A resumed run builds the same shapes, whatever its machine takes by then.
        keep = context.memo(self.type, lambda: self._choose(model, context, layers, parts, batches))["keep"]
        for pair, kept in steps(list(zip(parts, keep, strict=True)), "pass ziplm: removing"):
            for part, groups in zip(pair, (kept["heads"], kept["ffn"]), strict=True):
                part.keep(groups)
        staying = [i for i, kept in enumerate(keep) if _stays(kept)]
        if len(staying) < len(layers):
            drop_layers(model, staying)
        shrink(model, [{name: torch.tensor(kept) for name, kept in keep[i].items()} for i in staying])

    def kept(self, depth: int, context: Context) -> list[int]:
        """Indices of the layers that stay, of `depth`.

        Raises:
            UserError: `prepare` has not chosen, or nothing remembers what.
        """

        def unknown() -> NoReturn:
            raise UserError("pass ziplm: which layers stay is not known here; run it in a recipe's stage")

        keep = context.memo(self.type, unknown)["keep"]
        return [i for i in range(depth) if _stays(keep[i])]

    def _parts(
        self, model: nn.Module, layers: Sequence[Layer], batches: Sequence[Mapping[str, Tensor]]
    ) -> list[tuple[Prunable, Prunable]]:
        """Per layer the projections whose input columns are the heads and the neurons."""
        paths = [f"{layer.name}.{path}" for layer in layers for path in (layer.family.o, layer.family.down)]
        squares, mean = moments(model, paths, batches)

        def part(layer: Layer, path: str, size: int) -> Prunable:
            name = f"{layer.name}.{path}"
            return Prunable(layer.part(path), size, squares.pop(name), mean[name], self.damping)

        return [(part(x, x.family.o, x.head_dim * x.heads // x.kv_heads), part(x, x.family.down, 1)) for x in layers]

    def _choose(
        self,
        model: nn.Module,
        context: Context,
        layers: Sequence[Layer],
        parts: Sequence[tuple[Prunable, Prunable]],
        batches: Sequence[Mapping[str, Tensor]],
    ) -> dict[str, object]:
        """{"keep": per layer the kept {"heads", "ffn"}, and what the choice was made of}, a JSON value."""
        table, budget = cost_table(model, self.target, context, "pass ziplm")
        number = min(max(len(batches) // SHIFT_SHARE, 1), SHIFT_BATCHES)
        step = len(batches) // number
        shown = batches[step // 2 :: step][:number]
        shift = Shift(model, shown, [x.module for x in layers]) if self.measure == "model" else None
        orders, losses = [], []
        for i, layer in steps(list(enumerate(layers)), "pass ziplm: what each layer's parts are worth"):
            pair = parts[i]
            moved = shift and partial(shift, i)
            found = [part.removal() for part in pair]
            allowed = (
                sizes_allowed(layer.kv_heads, 1, self.floor_heads),
                sizes_allowed(layer.ffn, self.align, self.floor_ffn),
            )
            orders.append([order for order, _ in found])
            loss = [self._losses(part, *f, sizes, moved) for part, f, sizes in zip(pair, found, allowed, strict=True)]
            if self.layers:
                gone = 2.0
                if moved is not None:
                    with skipped(layer.module):
                        gone = moved()
                loss[0][0], loss[1][0] = gone, 0.0
            losses.append(loss)
        trials: list[Trial] = []

        def fitting(most: float) -> list[dict[str, int]]:
            return choose(table, most, [a for a, _ in losses], [f for _, f in losses])

        if self.target.timed and context.whole is not None:
            precision = self.target.precision or context.ships
            trials = tried(fitting, table, budget, partial(context.whole, self.target, precision))
            chosen = best(trials, budget).shapes
        else:
            chosen = fitting(budget)
        keep = [
            {
                "heads": sorted(order[0][len(order[0]) - shape["kv_heads"] :]),
                "ffn": sorted(order[1][len(order[1]) - shape["ffn"] :]),
            }
            for order, shape in zip(orders, chosen, strict=True)
        ]
        if not any(kept["ffn"] for kept in keep):
            raise UserError(f"pass ziplm.target.{self.target.kind}: would leave no layer; ask for less")
        return {
            "keep": keep,
            "cost": table.cost(chosen),
            "budget": budget,
            "trials": [{"cost": one.cost, "measured": one.measured} for one in trials],
            "losses": losses,
            "table": table.model_dump(mode="json"),
        }

    @staticmethod
    def _losses(
        part: Prunable, order: list[int], errors: list[float], sizes: list[int], shift: Callable[[], float] | None
    ) -> dict[int, float]:
        if shift is None:
            return {size: errors[len(order) - size] for size in sizes}
        return model_losses(part, order, errors, sizes, shift)

    def changes(self) -> Sequence[Claim]:
        found = [Claim(Resource.STARTING_SHAPES, "removes heads and neurons before training")]
        if self.layers:
            found.append(
                Claim(Resource.STARTING_LAYERS, "removes layers before training", "layers", "leave layers out")
            )
        return found


def _stays(kept: dict[str, list[int]]) -> bool:
    return bool(kept["heads"] and kept["ffn"])
