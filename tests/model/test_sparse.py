"""Forms of tensors in files: the smallest one is taken, its bytes are the formula's, and it gives the bits back."""

import pytest
import torch

from compressft.model.saved.codes import Code, decode, encode
from compressft.model.saved.sparse import pack, pack_places, stored_bytes, unpack, unpack_places

SHAPES = [(1, 1), (5, 13), (16, 64), (40, 100)]


def drawn(rows, columns, share, seed=0):
    """A bool mask (rows, columns) with exactly this share of entries True."""
    generator = torch.Generator().manual_seed(seed + rows)
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    mask[torch.randperm(rows * columns, generator=generator)[: round(share * rows * columns)]] = True
    return mask.view(rows, columns)


def full(rows, columns, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) + 9.0).to(dtype)


def round_trip(tensor, base=None):
    """The parts of a tensor's form, once it has been seen to give the tensor back."""
    base = None if base is None else {"w": base}
    packed = pack({"w": tensor}, base)
    back = unpack(packed, base)
    assert back.keys() == {"w"} and back["w"].dtype == tensor.dtype
    assert back["w"].is_contiguous() and torch.equal(back["w"], tensor)
    return packed


def bits(shape):
    return shape[0] * ((shape[1] + 7) // 8)


# Places.


@pytest.mark.parametrize("share", [0.0, 0.004, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 70_000)])
def test_places_round_trip(shape, share):
    mask = drawn(*shape, share)
    places = pack_places(mask)
    assert places.nbytes <= bits(shape)
    assert torch.equal(unpack_places(places, mask.shape), mask)


def test_gaps_jump_over_what_one_code_cannot_say():
    """A byte says up to 254 places in between, 255 says 255 of them and that nothing is here."""
    for between in (0, 1, 253, 254, 255, 256, 509, 510, 511, 65534, 65535, 65536, 131071):
        mask = torch.zeros(4, 70_000, dtype=torch.bool)
        first = 3
        mask.view(-1)[[first, first + 1 + between]] = True
        places = pack_places(mask)
        assert places.dim() == 1 and torch.equal(unpack_places(places, mask.shape), mask)
        small = 2 + between // 255
        assert places.nbytes == min(small, 2 * (2 + between // 65535))
    one = pack_places(torch.tensor([[False] * 254 + [True] * 2 + [False] * 1000]))
    assert one.tolist() == [254, 0]
    assert pack_places(torch.tensor([[False] * 255 + [True] + [False] * 1000])).tolist() == [255, 0]


def test_gaps_cost_about_a_byte_and_a_half_at_half_a_per_cent():
    mask = drawn(200, 1000, 0.005)
    assert pack_places(mask).nbytes < 1.45 * int(mask.sum())
    # From an eighth on, bits are smaller.
    assert pack_places(drawn(40, 104, 0.13)).shape == (40, 13)
    assert pack_places(drawn(40, 104, 0.11)).dim() == 1


# Forms without a base.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.2, 0.02])
@pytest.mark.parametrize("shape", SHAPES)
def test_pruned_is_places_and_values(shape, share, dtype):
    weight = full(*shape, dtype) * drawn(*shape, share)
    packed = round_trip(weight)
    nonzeros = int(weight.count_nonzero())
    places = pack_places(weight != 0).nbytes
    assert stored_bytes(packed) == min(places + nonzeros * dtype.itemsize, weight.nbytes)
    assert places <= bits(shape)


def test_only_where_it_is_smaller():
    # 64 columns: 8 bytes of bits a row, two weights' worth.
    tensors = {
        "w": full(4, 64) * drawn(4, 64, 62 / 64),
        "less": full(4, 64) * drawn(4, 64, 62 / 64 - 1 / 256),
        "bias": torch.zeros(9),
        "n": torch.zeros(3, 9).long(),
    }
    packed = pack(tensors)
    assert packed.keys() == {"w", "less#bits", "less#values", "less#shape", "bias", "n"}
    assert all(torch.equal(value, tensors[name]) for name, value in unpack(packed).items())


def test_folders_written_before_there_were_other_forms():
    weight = full(5, 13) * drawn(5, 13, 0.5)
    from compressft_kernels import pack_mask

    old = {"w#bits": pack_mask(weight != 0), "w#values": weight[weight != 0], "w#shape": torch.tensor([5, 13])}
    assert torch.equal(unpack(old)["w"], weight)


# Forms with a base.


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_is_one_bit_a_weight(shape):
    base = full(*shape)
    weight = base * drawn(*shape, 0.5)
    packed = round_trip(weight, base)
    assert stored_bytes(packed) <= bits(shape)
    if min(shape) > 8:
        assert {name: t.nbytes for name, t in packed.items()} == {"w#dropped_bits": bits(shape)}


def test_a_mask_of_few_zeros_is_less_than_a_bit():
    base = full(64, 128)
    packed = round_trip(base * ~drawn(64, 128, 0.05), base)
    assert packed.keys() == {"w#dropped_gaps"} and stored_bytes(packed) < 0.5 * bits((64, 128))


def test_a_negative_zero_is_a_zero():
    base = -full(16, 64)
    weight = base * drawn(16, 64, 0.5)
    assert torch.signbit(weight[weight == 0]).all()
    assert set(round_trip(weight, base)) == {"w#dropped_bits"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_changes_are_places_and_new_values(dtype):
    base = full(40, 100, dtype)
    where = drawn(40, 100, 0.005)
    weight = torch.where(where, base * 1.01, base)
    changed = int((weight != base).sum())
    packed = round_trip(weight, base)
    assert set(packed) == {"w#changed_gaps", "w#changed"}
    assert stored_bytes(packed) < changed * (dtype.itemsize + 2)
    # Values, not differences: base + (new - base) is not always new.
    assert torch.equal(packed["w#changed"], weight[weight != base])


def test_many_changes_are_bits_and_new_values_and_more_are_dense():
    base = full(40, 104)
    half = torch.where(drawn(40, 104, 0.5), base * 1.01, base)
    assert {n: t.nbytes for n, t in round_trip(half, base).items()} == {
        "w#changed_bits": 40 * 13,
        "w#changed": 4 * 40 * 52,
    }
    assert set(round_trip(base * 1.01, base)) == {"w"}


def test_dropped_and_changed_at_once():
    base = full(40, 104)
    weight = torch.where(drawn(40, 104, 0.01), base * 1.01, base) * ~drawn(40, 104, 0.4, seed=5)
    packed = round_trip(weight, base)
    assert set(packed) == {"w#dropped_bits", "w#changed_gaps", "w#changed"}
    # Zeros of the base are no news, zeros in the base that are none now are.
    base = base * drawn(40, 104, 0.9, seed=2)
    other = torch.where(drawn(40, 104, 0.01), full(40, 104, seed=3), base)
    assert set(round_trip(other, base)) == {"w#changed_gaps", "w#changed"}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0])
def test_signs_and_steps_are_found_to_the_bit(size, turned):
    """A scaled bit or byte an entry, whatever of it rounding swallowed: what the difference itself no longer shows."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(40, 104, generator=generator) * 0.05
    change = torch.randn(40, 104, generator=generator) * size
    change[5] = 0.0
    scale = change.abs().mean(1, keepdim=True)
    signed = torch.where(change > 0, scale, -scale)
    step = change.abs().amax(1, keepdim=True) / 127
    stepped = (change / step.clamp(min=1e-30)).round() * step
    for moved, kind, cost in ((signed, "w#signs", 40 * 13), (stepped, "w#steps", 40 * 104)):
        weight, old = base + moved, base
        if turned:
            weight, old = weight.t().contiguous(), base.t().contiguous()
            cost = 104 * 5 if kind == "w#signs" else cost
        packed = round_trip(weight, old)
        assert {kind, "w#scale"} <= set(packed) and packed["w#scale"].numel() == 40
        assert stored_bytes(packed) == cost + 160
    assert set(round_trip(base + change, base)) == {"w"} or size < 1e-4


@pytest.mark.parametrize("turned", [False, True])
def test_a_difference_of_low_rank_is_two_factors(turned):
    """What rounding took from the sum is put back as single floats up or down."""
    base, change = (full(160, 104) - 9.0) * 0.05, (full(160, 104, seed=1) - 9.0) * 0.002
    for rank, share in ((1, 0.08), (4, 0.2)):
        moved = decode(encode(change, Code("low_rank", rank=rank))) * 0.7
        weight, old = (base + moved, base) if not turned else ((base + moved).t().contiguous(), base.t().contiguous())
        packed = round_trip(weight, old)
        assert {"w#left", "w#right"} <= set(packed) and packed["w#left"].shape[1] == rank
        assert stored_bytes(packed) < share * weight.nbytes
    assert set(round_trip(base + change, base)) == {"w"}
    # Nothing but a few rows, and trained freely: no sum of outer products.
    rows = base.clone()
    rows[::10] += change[::10]
    assert "w#left" not in round_trip(rows, base)


def test_neighbouring_floats_are_a_byte():
    base = full(40, 104) - 9.0
    up, far = drawn(40, 104, 0.01, seed=1), drawn(40, 104, 0.002, seed=2)
    weight = torch.where(up, torch.nextafter(base, torch.tensor(torch.inf)), base)
    packed = round_trip(weight, base)
    assert set(packed) == {"w#nudged_gaps", "w#nudged"} and packed["w#nudged"].dtype == torch.int8
    assert set(packed["w#nudged"].tolist()) == {1, -1}
    packed = round_trip(torch.where(far, -weight, weight), base)
    assert set(packed) == {"w#nudged_gaps", "w#nudged", "w#changed_gaps", "w#changed"}
    assert packed["w#changed"].numel() == int(far.sum())


def test_rows_and_columns_of_the_base_are_their_numbers():
    base = full(40, 24)
    base[7] = base[3]
    rows = torch.tensor([0, 3, 7, 31])
    assert {n: t.nbytes for n, t in round_trip(base[rows], base).items()} == {"w#rows": 16}
    assert {n: t.nbytes for n, t in round_trip(base[:, rows[:3]], base).items()} == {"w#columns": 12}
    assert set(round_trip(base[rows] + 1e-3, base)) == {"w"}
    assert set(round_trip(base[rows][:, rows[:3]], base)) == {"w"}


def test_the_base_itself_is_nothing():
    base = full(40, 24)
    assert stored_bytes(round_trip(base, base)) == 0


def test_a_base_of_another_kind_is_no_help():
    weight = full(5, 13)
    for base in (full(5, 13, torch.bfloat16), torch.zeros(5), torch.zeros(3, 4, 5), torch.zeros(6, 14)):
        assert set(round_trip(weight, base)) == {"w"}


def test_nan_and_infinity_survive():
    base = full(16, 64)
    weight = base.clone()
    weight[3, 5], weight[0, 0] = torch.nan, torch.inf
    back = unpack(pack({"w": weight}, {"w": base}), {"w": base})["w"]
    assert torch.equal(back.view(torch.int32), weight.view(torch.int32))
    for other in (base * torch.nan, base.masked_fill(base > 9, torch.inf)):
        back = unpack(pack({"w": other}, {"w": base}), {"w": base})["w"]
        assert torch.equal(back.view(torch.int32), other.view(torch.int32))
