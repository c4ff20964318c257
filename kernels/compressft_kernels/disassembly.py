"""What cuobjdump prints of a kernel's machine code (SASS): its instructions, and its inner loops with products."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

PRODUCT = r"HGMMA|HMMA|UTC\w*MMA"
COPY = r"LDGSTS|UTMALDG"
LOAD = r"LDG\b"
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;", re.MULTILINE)


@dataclass(frozen=True)
class Instruction:
    """One line: `@P0 BRA 0x10` at 0x40 is (64, "@P0", "BRA", "0x10")."""

    place: int
    predicate: str
    name: str
    operands: str

    def target(self) -> int | None:
        """Where it may go on, if it is a branch."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if self.name.startswith("BRA") else None
        return None if found is None else int(found[1], 16)

    def falls_through(self) -> bool:
        """Whether the next instruction may follow; a uniform predicate is the branch's first operand."""
        ends = self.name.startswith(("BRA", "EXIT"))
        return not ends or bool(self.predicate) or "," in self.operands


@dataclass(frozen=True)
class Loop:
    """A loop that multiplies on tensor cores and holds no other that does."""

    instructions: int
    products: int
    copies: int  # from global to shared memory, for which the loop does not wait
    loads: int  # from global memory to registers: where they are used the loop waits for them


def read(code: str) -> list[Instruction]:
    """The instructions in the order in which they lie."""
    return [Instruction(int(place, 16), *rest) for place, *rest in _LINE.findall(code)]


def count(instructions: Sequence[Instruction], pattern: str) -> int:
    """How many have a name that begins so."""
    return sum(re.match(pattern, one.name) is not None for one in instructions)


def inner_loops(instructions: Sequence[Instruction]) -> tuple[Loop, ...]:
    """The loops with products but without such loops in them, in the order in which they begin."""
    multiplying = {}
    for first, places in _loops(instructions).items():
        body = [instructions[place] for place in sorted(places)]
        if count(body, PRODUCT):
            multiplying[first] = places
    inner = [first for first, places in multiplying.items() if not any(o < places for o in multiplying.values())]
    bodies = ([instructions[place] for place in multiplying[first]] for first in sorted(inner))
    return tuple(Loop(len(body), count(body, PRODUCT), count(body, COPY), count(body, LOAD)) for body in bodies)


def _loops(instructions: Sequence[Instruction]) -> dict[int, set[int]]:
    """First instruction -> all of each natural loop, wherever they lie: what leads back to it, not around it."""
    after = _successors(instructions)
    order = _reached(after)
    before: dict[int, list[int]] = defaultdict(list)
    for place in order:
        for one in after[place]:
            before[one].append(place)
    number = {place: rank for rank, place in enumerate(order)}
    # The nearest instruction through which every way to one goes (Cooper, Harvey and Kennedy, 2001).
    gate = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for place in order[1:]:
            known = [one for one in before[place] if one in gate]
            best = known[0]
            for one in known[1:]:
                while one != best:
                    if number[one] > number[best]:
                        one = gate[one]
                    else:
                        best = gate[best]
            if gate.get(place) != best:
                gate[place], changed = best, True
    loops: dict[int, set[int]] = defaultdict(set)
    for last in order:
        for first in after[last]:
            if number[first] <= number[last] and _goes_through(gate, last, first):
                loops[first] |= {first} | _leading_to(before, last, first)
    return loops


def _successors(instructions: Sequence[Instruction]) -> list[list[int]]:
    """The positions at which each instruction may go on."""
    position = {one.place: place for place, one in enumerate(instructions)}
    after = []
    for place, one in enumerate(instructions):
        target = one.target()
        following = [] if target is None else [position[target]]
        if one.falls_through() and place + 1 < len(instructions):
            following.append(place + 1)
        after.append(following)
    return after


def _reached(after: Sequence[Sequence[int]]) -> list[int]:
    """What can be reached from the first instruction, each before what follows it but for ways back."""
    seen, finished, todo = {0}, [], [(0, iter(after[0]))]
    while todo:
        place, following = todo[-1]
        for one in following:
            if one not in seen:
                seen.add(one)
                todo.append((one, iter(after[one])))
                break
        else:
            finished.append(place)
            todo.pop()
    return finished[::-1]


def _goes_through(gate: dict[int, int], place: int, other: int) -> bool:
    """Whether every way to `place` goes through `other`."""
    while place not in (other, gate[place]):
        place = gate[place]
    return place == other


def _leading_to(before: dict[int, list[int]], place: int, first: int) -> set[int]:
    """What leads to `place` without going through `first`."""
    found, todo = {place}, [place]
    while todo:
        one = todo.pop()
        if one != first:
            more = [p for p in before[one] if p not in found]
            found.update(more)
            todo += more
    return found
