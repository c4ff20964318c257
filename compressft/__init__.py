"""compressft: fine-tune a pretrained transformer while it is compressed, and ship a verified ONNX file."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from compressft.utils.version import __version__ as __version__

if TYPE_CHECKING:
    from compressft.adapters.named_adapters import Adapted, get_model
    from compressft.errors import UserError
    from compressft.model.load import load_model
    from compressft.model.saved.compressed import load_compressed
    from compressft.model.saved.delta import load_delta
    from compressft.model.saved.vectors import TaskVector
    from compressft.recipe.recipe import Recipe, load_recipe
    from compressft.run.flow import run as run_recipe
    from compressft.transform import Transform

__all__ = [
    "Adapted",
    "Recipe",
    "TaskVector",
    "Transform",
    "UserError",
    "get_model",
    "load_compressed",
    "load_delta",
    "load_model",
    "load_recipe",
    "run_recipe",
]

# Names load on first use, so that `import compressft` stays fast: public name -> (module, name there).
_HOMES = {
    "Adapted": ("compressft.adapters.named_adapters", "Adapted"),
    "Recipe": ("compressft.recipe.recipe", "Recipe"),
    "TaskVector": ("compressft.model.saved.vectors", "TaskVector"),
    "Transform": ("compressft.transform", "Transform"),
    "UserError": ("compressft.errors", "UserError"),
    "get_model": ("compressft.adapters.named_adapters", "get_model"),
    "load_compressed": ("compressft.model.saved.compressed", "load_compressed"),
    "load_delta": ("compressft.model.saved.delta", "load_delta"),
    "load_model": ("compressft.model.load", "load_model"),
    "load_recipe": ("compressft.recipe.recipe", "load_recipe"),
    "run_recipe": ("compressft.run.flow", "run"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module, attribute = _HOMES[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'compressft' has no attribute {name!r}")
