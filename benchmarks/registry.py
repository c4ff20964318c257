"""One row per benchmark: name -> (module, what it shows)."""

BENCHMARKS: dict[str, tuple[str, str]] = {
    "compression": (
        "benchmarks.compression",
        "accuracy, bytes and milliseconds of pruned, quantised, distilled models",
    ),
    "edge": ("benchmarks.edge", "bytes, milliseconds and accuracy of the files that the edge recipes ship"),
    "ops": ("benchmarks.ops", "correctness, time and memory of the kernels' operators beside every peer there is"),
}
