"""Sphinx: the guide is Markdown; the reference is generated from the schema of recipes before every build."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "kernels")]

from reference import write_reference  # noqa: E402

from compressft.utils.version import __version__  # noqa: E402

project = "compressft"
author = "The compressft developers"
release = __version__
extensions = ["myst_parser"]
html_theme = "furo"
html_title = f"compressft {__version__}"
exclude_patterns = ["_build"]
myst_heading_anchors = 3

write_reference(HERE / "reference.md")
