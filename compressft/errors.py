"""The exceptions that the command line turns into exit codes, and what their messages are made of."""

import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """A mistake in a recipe, a file or a command: one line with what, where and the fix. Exit code 2."""


class VerificationError(RuntimeError):
    """The exported file does not do what the trained model does. Exit code 1."""


class Interrupted(Exception):
    """Training stopped by SIGINT or SIGTERM after a checkpoint was published. Exit code 130."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the closest allowed name, or an empty string."""
    match = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and what was being handled then."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop(0)
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [other for other in (one.__cause__, one.__context__) if other is not None]


def system_error(error: BaseException) -> OSError | None:
    """What the operating system refused, wherever in the chain it stands; None where it refused nothing.

    Libraries in Rust say it in words alone: "No space left on device (os error 28)".
    """
    for one in chain(error):
        if isinstance(one, OSError) and one.errno is not None:
            return one
        number = re.search(r"\(os error (\d+)\)", str(one))
        if number:
            return OSError(int(number[1]), os.strerror(int(number[1])))
    return None


def reason(error: BaseException) -> str:
    """Why something failed, in one line: the operating system's reason where there is one, else the error's text."""
    refused = system_error(error)
    if refused is not None:
        return str(refused.strerror or refused)
    said = " ".join(str(error).split())
    return said or type(error).__name__


# What the machine refuses through no fault of ours, and what to do about it.
FIXES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "get the permission or give another path"),
    errno.EROFS: "give a path that can be written to",
    errno.EIO: "check the disk",
    errno.EFBIG: "give a file system that takes larger files",
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR), "give another path"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files"),
}


def trouble(error: BaseException) -> str | None:
    """What the machine refused and the fix, in one line; None where the error is another, perhaps a fault of ours."""
    refused = system_error(error)
    if refused is not None and refused.errno in FIXES:
        at = f"{refused.filename}: " if refused.filename is not None else ""
        return f"{at}{os.strerror(refused.errno)}; {FIXES[refused.errno]}"
    for one in chain(error):
        if isinstance(one, MemoryError) or "allocate memory" in str(one) or type(one).__name__ == "OutOfMemoryError":
            return "not enough memory; see `compressft plan`, and take a smaller batch, length or model"
    return None
