"""compressft: fine-tune a pretrained transformer while it is compressed, and ship a verified ONNX file."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressft.adapted import Adapted, get_model
    from compressft.checkpoint import load_compressed, load_delta
    from compressft.errors import UserError
    from compressft.model import load_model
    from compressft.recipe import Recipe, load_recipe
    from compressft.run import run as run_recipe
    from compressft.transform import Transform
    from compressft.vectors import TaskVector

__version__ = "0.1.0"
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
    "Adapted": ("compressft.adapted", "Adapted"),
    "Recipe": ("compressft.recipe", "Recipe"),
    "TaskVector": ("compressft.vectors", "TaskVector"),
    "Transform": ("compressft.transform", "Transform"),
    "UserError": ("compressft.errors", "UserError"),
    "get_model": ("compressft.adapted", "get_model"),
    "load_compressed": ("compressft.checkpoint", "load_compressed"),
    "load_delta": ("compressft.checkpoint", "load_delta"),
    "load_model": ("compressft.model", "load_model"),
    "load_recipe": ("compressft.recipe", "load_recipe"),
    "run_recipe": ("compressft.run", "run"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module, attribute = _HOMES[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'compressft' has no attribute {name!r}")
