"""What the benchmarks' command lines share."""

import argparse


def positive(text: str) -> int:
    """An `argparse` type: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)
