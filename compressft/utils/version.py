"""The version of this package, by itself so that it costs nothing to read."""

__version__ = "0.1.0"
