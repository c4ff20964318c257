"""What cannot run together, as computed from declarations: both ways round, in one line, with a way out that helps."""

from itertools import permutations

import pytest

from compressft.methods.head_gates import HeadGates
from compressft.methods.probe import Probe
from compressft.passes.block import Block
from compressft.passes.int4 import Int4
from compressft.passes.n_m import NM
from compressft.passes.nf4 import Nf4
from compressft.passes.structured import Structured
from compressft.recipe.conflict import conflict
from compressft.transform import PARTS, QUANTISES, REMOVES, WEIGHTS, Claim, Resource, Transform, Want
from tests.settings import ROWS, made

EVERY = [made(name, ("a", "b")) for rows, _ in ROWS for name in rows]


class Stranger(Transform):
    type: str = "stranger"
    taken: tuple[Resource, ...] = ()
    changed: tuple[Resource, ...] = ()
    wanted: tuple[Resource, ...] = ()

    def takes(self):
        return [Claim(one, "takes it", "taken") for one in self.taken]

    def changes(self):
        return [Claim(one, "changes it", "changed") for one in self.changed]

    def wants(self):
        return [Want(one, "wants it", "wanted") for one in self.wanted]


def ordered(place):
    """A Transform that says no more than when it acts."""

    class Ordered(Transform):
        type: str = "ordered"
        order = place

    return Ordered()


def test_every_pair_is_judged_alike_both_ways_round_in_one_line():
    for one, other in permutations(EVERY, 2):
        there, back = conflict([one, other]), conflict([other, one])
        assert (there is None) == (back is None)
        if there is not None:
            place, _, fix = there.partition("; ")
            assert "\n" not in there and len(fix) > 8 and (one.type in place or other.type in place)


def test_declarations_name_fields_that_exist():
    for one in EVERY:
        for claim in (*one.alters(), *one.wants()):
            assert not claim.field or claim.field in type(one).model_fields
            assert claim.reason and not claim.reason.endswith(".")


@pytest.mark.parametrize("resource", Resource)
def test_what_is_taken_is_nobody_elses(resource):
    taking, wanting = Stranger(taken=(resource,)), Stranger(wanted=(resource,))
    changing = Stranger(changed=(resource,))
    other = Stranger(taken=tuple(one for one in Resource if one is not resource))
    assert f"both decide {resource.value}, and only one can; keep one of the two" in conflict([taking, taking])
    for pair in ([wanting, taking], [taking, wanting]):
        assert conflict(pair) == "stranger.wanted: wants it, and stranger.taken takes it; keep one of the two"
    for pair in ([changing, taking], [taking, changing]):
        assert conflict(pair).startswith("stranger.taken and stranger.changed both decide")
    assert "stranger.changed changes it" in conflict([changing, wanting]) and conflict([changing, changing]) is None
    assert conflict([taking, other]) is None and conflict([wanting, other]) is None
    assert conflict([wanting, wanting]) is None and conflict([taking]) is None


def test_who_only_says_when_it_acts_is_taken_at_its_word():
    assert "groups of input columns" in conflict([NM(), ordered(PARTS)])
    assert "counts tiles" in conflict([Block(sparsity=0.5), ordered(PARTS)])
    for place in (WEIGHTS, PARTS, QUANTISES):
        assert "set method.cache to false" in conflict([Probe(), ordered(place)])
    stacked = made("fusion", ("a",))
    assert "in a stage after this one" in conflict([stacked, ordered(REMOVES)])
    for one in EVERY:
        assert conflict([one, Transform(type="plain")]) is None


def test_of_several_reasons_the_one_is_given_that_least_can_be_done_about():
    # Frozen weights would help against the first alone: heads take columns with them all the same.
    assert "frozen" in conflict([HeadGates(), Nf4()])
    assert conflict([HeadGates(), Int4(rounding="gptq")]).endswith("removes input columns; use 'nearest'")
    assert conflict([Block(sparsity=0.5), Structured(heads=0.5, ffn=0.5)]).endswith("; keep one of the two")
