"""compressft: fine-tune a pretrained transformer while it is compressed, and ship a verified ONNX file."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressft.checkpoint import load_compressed
    from compressft.errors import UserError
    from compressft.model import load_model
    from compressft.recipe import Recipe, load_recipe
    from compressft.run import run
    from compressft.transform import Transform

__version__ = "0.1.0"
__all__ = ["Recipe", "Transform", "UserError", "load_compressed", "load_model", "load_recipe", "run"]

_HOMES = {
    "Recipe": "compressft.recipe",
    "Transform": "compressft.transform",
    "UserError": "compressft.errors",
    "load_compressed": "compressft.checkpoint",
    "load_model": "compressft.model",
    "load_recipe": "compressft.recipe",
}


def run(*args: Any, **kwargs: Any) -> Any:
    """Run a recipe; see `compressft.run.run`."""
    from compressft.run import run as run_recipe

    return run_recipe(*args, **kwargs)


def __getattr__(name: str) -> Any:
    # Names load on first use, so that `import compressft` stays fast.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'compressft' has no attribute {name!r}")
