"""Packed tensors of strangers: a damaged part is one line, and nothing larger than the model is ever allocated."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from compressft.errors import UserError
from compressft.model.saved.codes import Code, decode, encode
from compressft.model.saved.parts import MOST
from compressft.model.saved.sparse import pack, unpack

BASE = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)) * 0.05
BASE[3] = BASE[5]
DRAWN = torch.rand(24, 40, generator=torch.Generator().manual_seed(1))
WIDE = torch.randn(160, 104, generator=torch.Generator().manual_seed(2)) * 0.05
CHANGE = torch.randn(160, 104, generator=torch.Generator().manual_seed(3)) * 0.002


def coded(kind: str, **more) -> torch.Tensor:
    return BASE + decode(encode(CHANGE[:24, :40], Code(kind, **more)))


# One of every form, by a base of its own; with neighbouring and far values put right.
TENSORS = {
    "pruned_bits": (BASE * (DRAWN < 0.4), None),
    "pruned_gaps": (BASE * (DRAWN < 0.05), None),
    "dropped_bits": (BASE * (DRAWN < 0.5), BASE),
    "dropped_gaps": (BASE * (DRAWN < 0.95), BASE),
    "changed": (torch.where(DRAWN < 0.02, BASE * 1.5, BASE), BASE),
    "both": (torch.where(DRAWN < 0.02, BASE * 1.5, BASE) * (DRAWN < 0.6), BASE),
    "nudged": (torch.where(DRAWN < 0.05, torch.nextafter(BASE, torch.tensor(9.0)), BASE), BASE),
    "signs": (coded("sign"), BASE),
    "steps": (coded("int8"), BASE),
    "factors": (WIDE + decode(encode(CHANGE, Code("low_rank", rank=2))), WIDE),
    "rows": (BASE[[0, 7, 9]], BASE),
    "columns": (BASE[:, [0, 7, 9]].contiguous(), BASE),
    "whole": (DRAWN, BASE),
}
PLAIN = {name: tensor for name, (tensor, _) in TENSORS.items()}
BASES = {name: base for name, (_, base) in TENSORS.items() if base is not None}
SHAPES = {name: tensor.shape for name, tensor in PLAIN.items()}
PACKED = pack(PLAIN, BASES)
LARGEST = 4 * sum(tensor.numel() for tensor in PLAIN.values())
SUFFIXES = sorted({name.partition("#")[2] for name in PACKED if "#" in name} | {"bits", "changed_bits", "of-tomorrow"})
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.uint16, torch.bool)
SIZES = (0, 1, 3, 8, 40, 2**31, 10**6, 10**9, 2**62, -1)


def test_every_form_is_there():
    suffixes = {name.partition("#")[2] for name in PACKED if "#" in name}
    assert suffixes >= {"values", "shape", "bits", "gaps", "dropped_bits", "dropped_gaps", "changed", "changed_gaps"}
    assert suffixes >= {"nudged", "nudged_gaps", "signs", "steps", "scale", "left", "right", "rows", "columns"}


class Allocations(TorchDispatchMode):
    """Refuses an operation that makes a tensor of more bytes than `most`."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, torch.Tensor):
                assert one.untyped_storage().nbytes() <= self.most, (function, one.shape)
        return made


def opened(packed, base=BASES, shapes=SHAPES):
    """Nothing larger than the whole model is made; than a limit, where no reader says what is needed."""
    with Allocations(LARGEST if shapes else 8 * MOST):
        return unpack(packed, base, shapes, "delta.safetensors")


@pytest.mark.parametrize("shapes", [SHAPES, None])
def test_what_was_packed_comes_back(shapes):
    found = opened(PACKED, shapes=shapes)
    assert found.keys() == PLAIN.keys() and all(torch.equal(found[name], PLAIN[name]) for name in PLAIN)


HOW = ("gone", "renamed", "cut", "dtype", "values", "shape", "swapped", "filled", "empty")
# What is done to a part, which, and what with.
EDITS = st.lists(st.tuples(st.sampled_from(HOW), *(st.integers(0, 10**4) for _ in range(3))), min_size=1, max_size=3)


def damaged(edits):
    """Parts of a file that somebody has changed."""
    packed = dict(PACKED)
    for how, which, one, other in edits:
        names = sorted(packed)
        name, second = names[which % len(names)], names[one % len(names)]
        part, choose = packed[name], lambda options: options[one % len(options)]  # noqa: B023
        if how == "gone":
            del packed[name]
        elif how == "renamed":
            owner = choose([*PLAIN, "", "of nobody"])
            packed[f"{owner}#{SUFFIXES[other % len(SUFFIXES)]}"] = packed.pop(name)
        elif how == "cut":
            packed[name] = part[: one % (len(part) + 1)] if part.dim() else part
        elif how == "dtype":
            packed[name] = part.float().nan_to_num().to(choose(DTYPES))
        elif how == "values":
            values = part.reshape(-1).tolist()
            at = one % max(len(values), 1)
            values[at : at + 1] = [other % 128] * min(len(values), 1)
            packed[name] = torch.tensor(values).to(part.dtype).view(part.shape)
        elif how == "shape":
            sizes = [choose(SIZES), SIZES[other % len(SIZES)], 1][: other % 4]
            packed[name.partition("#")[0] + "#shape"] = torch.tensor(sizes, dtype=torch.int64)
        elif how == "swapped":
            packed[name], packed[second] = packed[second], packed[name]
        elif how == "filled":
            packed[name] = torch.full((one,), other % 101).to(part.dtype)
        else:
            packed[name] = torch.empty(choose([(0,), (), (0, 40), (1, 1, 1)]), dtype=part.dtype)
    return packed


@given(edits=EDITS, known=st.booleans(), based=st.booleans())
@settings(max_examples=400)
def test_damaged_parts_are_one_line_or_a_tensor_of_the_shape_that_is_wanted(edits, known, based):
    packed = damaged(edits)
    try:
        found = opened(packed, BASES if based else None, SHAPES if known else None)
    except UserError as error:
        assert str(error).startswith("delta.safetensors: tensor '") and str(error).endswith("; restore the file")
        assert "\n" not in str(error)
        return
    for name, tensor in found.items():
        if known and any(key.startswith(f"{name}#") for key in packed):
            assert tensor.shape == SHAPES[name] and tensor.is_floating_point()


def changed(**parts):
    """The packed tensors with other parts; None removes one."""
    named = {name.replace("__", "#"): part for name, part in parts.items()}
    return {name: part for name, part in {**PACKED, **named}.items() if part is not None}


HUGE = torch.tensor([10**6, 10**6])
EMPTY = torch.zeros(0, dtype=torch.uint8)
CASES = {
    "a shape of four terabytes": (
        changed(pruned_gaps__shape=HUGE, pruned_gaps__gaps=EMPTY, pruned_gaps__values=torch.zeros(0)),
        r"makes \(1000000, 1000000\), the model wants \(24, 40\)",
    ),
    "a shape that is none": (changed(pruned_bits__shape=torch.tensor([torch.nan, 40.0])), "is no shape"),
    "a negative shape": (changed(pruned_bits__shape=torch.tensor([-24, -40])), "is no shape"),
    "three dimensions": (changed(pruned_bits__shape=torch.tensor([24, 40, 1])), "is no shape"),
    "a shape alone": (changed(pruned_bits__values=None), "part #values is missing"),
    "no places": (changed(pruned_bits__bits=None), "#bits and #gaps are missing"),
    "places twice": (changed(pruned_bits__gaps=EMPTY), "#bits and #gaps are both there"),
    "rows of nobody": ({"new#rows": torch.tensor([0])}, "has no place in the model"),
    "rows beyond the base": (changed(rows__rows=torch.tensor([0, 7, 24])), "#rows are beyond the base's 24"),
    "rows before it": (changed(rows__rows=torch.tensor([0, 7, -1])), "#rows are beyond the base's 24"),
    "more rows than wanted": (changed(rows__rows=torch.zeros(10**5, dtype=torch.int32)), "the model wants"),
    "rows that are a mask": (changed(rows__rows=torch.ones(3, dtype=torch.uint8)), "no numbers of lines"),
    "places beyond the shape": (
        changed(pruned_gaps__gaps=torch.full_like(PACKED["pruned_gaps#gaps"], 254)),
        "a place is beyond its shape",
    ),
    "more values than places": (changed(changed__changed=torch.zeros(99)), r"has \d+ places for 99 values"),
    "values of another type": (changed(changed__changed=PACKED["changed#changed"].bfloat16()), "are torch.bfloat16"),
    "a scale alone": (changed(signs__signs=None), "part #signs is missing"),
    "a scale for nobody": (changed(signs__scale=torch.zeros(1, 1)), "is none for each row or column"),
    "half a product": (changed(factors__left=None), "part #left is missing"),
    "factors of other ranks": (changed(factors__left=torch.zeros(160, 3)), "do not fit the base's"),
    "a part of tomorrow": (changed(signs__sparkle=EMPTY), "part #sparkle does not belong there"),
    "whole and in parts": (changed(rows=BASE), "is there whole and in parts"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_said(case):
    packed, said = CASES[case]
    with pytest.raises(UserError, match=f"^delta.safetensors: tensor '.*': .*{said}.*; restore the file$"):
        opened(packed)


def test_without_a_reader_the_base_and_a_limit_say_what_is_too_large():
    nothing = {"w#gaps": EMPTY, "w#values": torch.zeros(0)}
    for sizes in ([10**6, 10**6], [2**62, 2**62], [2**31, 2**33]):
        with pytest.raises(UserError, match="more than 16,777,216 entries"):
            unpack({**nothing, "w#shape": torch.tensor(sizes)})
    with pytest.raises(UserError, match="which has none of this name"):
        unpack({"w#rows": torch.tensor([0])})
    zeros = torch.zeros(3000, 1000)
    assert torch.equal(unpack(pack({"w": zeros}))["w"], zeros)
