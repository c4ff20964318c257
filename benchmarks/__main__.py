"""`python -m benchmarks NAME [options]`."""

import sys
from importlib import import_module

from benchmarks.registry import BENCHMARKS


def main() -> int:
    """Run one benchmark by name; without a name list them."""
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        for name, (_, shows) in BENCHMARKS.items():
            print(f"{name:12} {shows}")
        return 0 if len(sys.argv) < 2 else 2
    return import_module(BENCHMARKS[sys.argv[1]][0]).main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
