"""Which Transforms cannot run together, from what each declares of the resources that it shares with others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from compressft.methods import METHODS
from compressft.objectives import OBJECTIVES
from compressft.passes import PASSES
from compressft.transform import Claim, Transform, Want

REGISTRIES = {"method": METHODS, "objective": OBJECTIVES, "pass": PASSES}
INSTEAD = "keep one of the two"


@dataclass(frozen=True)
class Reason:
    """Why Transforms cannot run together, and each of the ways out."""

    what: str
    fixes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.what}; {', or '.join(self.fixes)}"


def conflict(transforms: Sequence[Transform]) -> str | None:
    """Why these cannot run in one stage, fields and fix in one line, or None."""
    for one, other in combinations(transforms, 2):
        found = [*_between(one, other), *_between(other, one)]
        if found:
            # The one that least can be done about: what helps against another need not help against it.
            return str(min(found, key=lambda reason: sum(fix != INSTEAD for fix in reason.fixes)))
    return next((str(reason) for one in transforms for reason in _missing(one, transforms)), None)


def _between(one: Transform, other: Transform) -> Iterator[Reason]:
    """What `one` takes or wants and `other` alters."""
    altered = other.alters()
    for claim in one.takes():
        for its in altered:
            if its.resource is claim.resource:
                both = f"{_place(one, claim)} and {_place(other, its)} both decide {claim.resource.value}"
                yield Reason(f"{both}, and only one can", _distinct(INSTEAD, claim.fix, its.fix))
    for want in one.wants():
        for its in altered:
            if its.resource is want.resource and not want.given:
                what = f"{_place(one, want)}: {want.reason}, and {_place(other, its)} {its.reason}"
                yield Reason(what, _distinct(its.fix, want.fix) or (INSTEAD,))


def _missing(one: Transform, transforms: Sequence[Transform]) -> Iterator[Reason]:
    """What `one` wants to be given and none of the others gives."""
    for want in one.wants():
        if want.given and not any(want.resource in other.gives for other in transforms if other is not one):
            names = " or ".join(_givers(want))
            what = f"{_place(one, want)}: {want.reason}, and nothing in the stage tells {want.resource.value}"
            yield Reason(what, _distinct(names and f"add {names}", want.fix) or ("leave it out",))


def _givers(want: Want) -> list[str]:
    return [
        f"{kind} {name!r}"
        for kind, registry in REGISTRIES.items()
        for name, transform in registry.items()
        if want.resource in transform.gives
    ]


def _place(one: Transform, claim: Claim) -> str:
    """Kind and name as a recipe has them, with the field that says it: pass structured.heads."""
    kind = next((kind for kind, registry in REGISTRIES.items() if type(one) in registry.values()), "")
    return f"{kind} {one.type}.{claim.field}".strip() if claim.field else f"{kind} {one.type!r}".strip()


def _distinct(*fixes: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, fixes)))
