"""One row per benchmark: name -> (module, what it shows)."""

BENCHMARKS: dict[str, tuple[str, str]] = {
    "edge": ("benchmarks.edge", "bytes, milliseconds and accuracy of the files that the edge recipes ship"),
}
