"""The exceptions that the command line turns into exit codes, and the nearest-match helper their messages use."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a recipe, a file or a command: one line with what, where and the fix. Exit code 2."""


class VerificationError(RuntimeError):
    """The exported file does not do what the trained model does. Exit code 1."""


class Interrupted(Exception):
    """Training stopped by SIGINT after a checkpoint was published. Exit code 130."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the closest allowed name, or an empty string."""
    match = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""
