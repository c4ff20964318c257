"""`python -m benchmarks NAME [options]`."""

import logging
import sys
from importlib import import_module

from benchmarks.registry import BENCHMARKS
from compressft.errors import UserError
from compressft.utils.waiting import sleep_while_waiting


def main() -> int:
    """Run one benchmark by name; without a name list them. A mistake is one line and exit code 2."""
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        for name, (_, shows) in BENCHMARKS.items():
            print(f"{name:12} {shows}")
        return 0 if len(sys.argv) < 2 else 2
    sleep_while_waiting()
    # As in `compressft`: it recommends a hub package that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return import_module(BENCHMARKS[sys.argv[1]][0]).main(sys.argv[2:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
