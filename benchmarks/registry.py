"""One row per benchmark: name -> (module, what it shows)."""

BENCHMARKS: dict[str, tuple[str, str]] = {
    "arithmetic": (
        "benchmarks.arithmetic",
        "accuracy and milliseconds of the grids that int8 weights can be rounded to",
    ),
    "compression": (
        "benchmarks.compression",
        "accuracy, bytes and milliseconds of pruned, quantised, distilled models",
    ),
    "data": (
        "benchmarks.data",
        "seconds and memory until the first step on millions of rows, next to `datasets` used plainly",
    ),
    "edge": ("benchmarks.edge", "bytes, milliseconds and accuracy of the files that the edge recipes ship"),
    "install": ("benchmarks.install", "wheel and sdist in a clean environment: what pip pulls, and a smoke run"),
    "methods": ("benchmarks.methods", "score, trained parameters, bytes, time and memory of every method on real data"),
    "ops": ("benchmarks.ops", "correctness, time and memory of the kernels' operators next to every peer there is"),
    "parity": ("benchmarks.parity.run", "logits of converted adapters next to the `adapters` and `peft` packages"),
    "peers": ("benchmarks.peers", "training speed and memory next to the `peft` and `adapters` packages"),
    "portable": ("benchmarks.portable.run", "labels and largest error of files that ship, on emulated processors too"),
    "start": ("benchmarks.start", "seconds to the first training step and peak memory of every shipped recipe"),
    "scale": (
        "benchmarks.scale",
        "equality and work of 1, 2 and 4 processes, with copies and with pieces of the weights",
    ),
}
