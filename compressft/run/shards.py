"""Weights, gradients and moments in pieces, one for each process (FSDP2); whole for what looks at them, and at the end.

Inside the step's forward pass torch makes weights whole, layer by layer. Everywhere else `Shards.whole` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from compressft.utils import ranks


class Shards:
    """A module whose parameters are in pieces from here on, until `gather`.

    An optimiser's group with a scalar, which cannot be cut, stays whole in every process: gates and their multipliers.

    Args:
        step: what is called; its own forward pass makes whole what no unit holds.
        units: modules below it that become whole one after the other: the layers.
        optimizer: made of the parameters as they are; it takes the pieces instead. It has no state yet.
        keep: keep weights whole from forward to backward pass, so that what follows the forward pass may read them.
    """

    def __init__(
        self, step: nn.Module, units: Sequence[nn.Module], optimizer: torch.optim.Optimizer, keep: bool
    ) -> None:
        self.step = step
        self.optimizer = optimizer
        self.keep = keep
        self._before = {module: (type(module), set(module.__dict__)) for module in step.modules()}
        names = {parameter: name for name, parameter in step.named_parameters()}
        uncut = {parameter for parameter in names if parameter.ndim == 0}
        for group in optimizer.param_groups:
            if uncut & set(group["params"]):
                uncut |= set(group["params"])
        mesh = init_device_mesh(next(step.parameters()).device.type, (ranks.count(),))
        for unit in units:
            fully_shard(unit, mesh=mesh, reshard_after_forward=not keep, ignored_params=uncut)
        fully_shard(step, mesh=mesh, ignored_params=uncut)
        self._modules = [module for module in step.modules() if isinstance(module, FSDPModule)]
        pieces = dict(step.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [pieces[names[parameter]] for parameter in group["params"]]

    def average_uncut(self) -> None:
        """Give what is in no pieces the mean of the processes' gradients."""
        gradients = [p.grad for p in self.step.parameters() if p.grad is not None and not isinstance(p, DTensor)]
        ranks.average(gradients)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, parameters and their gradients are whole; what was written to parameters is in the pieces after."""
        pieces = {name: p for name, p in self.step.named_parameters() if isinstance(p, DTensor)}
        for module in self._modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        parameters = dict(self.step.named_parameters())
        for name, piece in pieces.items():
            if piece.grad is not None:
                parameters[name].grad = _whole(piece.grad)
        yield
        for name, piece in pieces.items():
            _write(piece, parameters[name])
        for module in self._modules:
            module.reshard()
            module.set_reshard_after_forward(not self.keep and module is not self.step, recurse=False)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """A state dict of the step's model with whole tensors, in every process."""
        whole = {parameter: _whole(parameter.detach()) for parameter in model.parameters()}
        state = model.state_dict(keep_vars=True)
        return {name: whole.get(value, value).detach() for name, value in state.items()}

    def moments(self) -> dict[str, Any]:
        """The optimiser's state dict with whole tensors, in every process: what one process would save."""
        state = self.optimizer.state_dict()
        entries = {
            number: {key: _whole(value) for key, value in entry.items()} for number, entry in state["state"].items()
        }
        return {**state, "state": entries}

    def cut_moments(self) -> None:
        """Whole moments have been loaded: keep this process's pieces of them."""
        for parameter, entry in self.optimizer.state.items():
            if isinstance(parameter, DTensor):
                entry.update(_cut(entry, parameter))

    def gather(self) -> None:
        """Make everything whole for good: modules and parameters are ordinary ones again."""
        whole: dict[nn.Parameter, nn.Parameter] = {}
        for module in self._modules:
            module.reshard()
        for parameter in self.step.parameters():
            if isinstance(parameter, DTensor):
                whole[parameter] = nn.Parameter(_whole(parameter.detach()), parameter.requires_grad)
        for module in self._modules:
            _release(module)
        for module, (kind, names) in self._before.items():
            module.__class__ = kind
            for name in set(module.__dict__) - names:
                if "fsdp" in name.lower() or name.startswith("__composable"):
                    del module.__dict__[name]
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter in whole:
                    module._parameters[name] = whole[parameter]
        self._modules = []


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def _write(piece: DTensor, whole: nn.Parameter) -> None:
    """Take over this process's rows of a whole parameter, and whether it learns."""
    parts = whole.detach().chunk(ranks.count())
    if ranks.number() < len(parts):
        piece.to_local().copy_(parts[ranks.number()])
    piece.requires_grad_(whole.requires_grad)
    whole.grad = None


def _cut(entry: Mapping[str, Any], parameter: DTensor) -> dict[str, DTensor]:
    whole = {key: value for key, value in entry.items() if isinstance(value, Tensor) and value.ndim}
    return {
        key: distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        for key, value in whole.items()
    }


def _release(module: Any) -> None:
    """Undo what `fully_shard` has registered; torch has no way back of its own."""
    from torch.distributed._composable_state import _module_state_mapping

    state = module._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    for group in state._fsdp_param_groups:
        for handles in (
            group._module_to_pre_save_state_dict_hook_handle,
            group._module_to_pre_load_state_dict_hook_handle,
        ):
            for handle in handles.values():
                handle.remove()
    _module_state_mapping.pop(module, None)
