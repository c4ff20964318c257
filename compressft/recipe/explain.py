"""What pydantic found wrong, in one line: path, value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from compressft.errors import nearest


def explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """One line for the first problem: path, value and what is allowed."""
    problems = _problems(error)
    first = problems[0]
    path = ".".join(str(p) for p in first["loc"])
    at = f"{where}.{path}" if path and where else (path or where)
    rest = len(problems) - 1
    more = f" (and {rest} more)" if rest else ""
    if first["type"] == "extra_forbidden":
        allowed = _fields_at(model, first["loc"][:-1])
        name = str(first["loc"][-1])
        return f"{at}: unknown field; allowed: {', '.join(allowed)}{nearest(name, allowed)}{more}"
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "literal_error":
        more = nearest(str(first["input"]), first.get("ctx", {})["expected"].split("'")[1::2]) + more
    if first["type"] == "value_error":
        return f"{at}: {message}{more}" if at else f"{message}{more}"
    return (
        f"{at}: {message} (got {first.get('input')!r}){more}"
        if first["type"] != "missing"
        else f"{at}: is required{more}"
    )


def _problems(error: ValidationError) -> list[ErrorDetails]:
    """All problems but one that follows from another: a list lacks the item that is wrong, and is called too short."""
    problems: list[ErrorDetails] = list(error.errors(include_url=False))

    def follows(problem: ErrorDetails) -> bool:
        at = problem["loc"]
        inside = any(len(other["loc"]) > len(at) and other["loc"][: len(at)] == at for other in problems)
        return problem["type"] == "too_short" and inside

    return [problem for problem in problems if not follows(problem)]


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    current = model
    for step in location:
        if isinstance(step, int) or step not in current.model_fields:
            # A place in a list, or a name that the user gave.
            continue
        annotation = current.model_fields[step].annotation
        arguments = [a for a in (annotation, *getattr(annotation, "__args__", ())) if isinstance(a, type)]
        current = next(a for a in arguments if issubclass(a, BaseModel))
    return sorted(current.model_fields)
