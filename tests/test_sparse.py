"""Bits and values: smaller exactly where zeros pay for the bits, and back to the bit."""

import pytest
import torch

from compressft.sparse import pack, packed_bytes, unpack


def pruned(rows, columns, kept, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator) + 3.0
    keep = torch.zeros(rows * columns)
    keep[torch.randperm(rows * columns, generator=generator)[:kept]] = 1
    return (weight * keep.view(rows, columns)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (16, 64)])
def test_round_trip_and_bytes(shape, dtype):
    weight = pruned(*shape, shape[0] * shape[1] // 10, dtype)
    packed = pack({"w": weight})
    back = unpack(packed)
    assert back.keys() == {"w"} and back["w"].dtype == dtype and torch.equal(back["w"], weight)
    stored = sum(t.numel() * t.element_size() for name, t in packed.items() if not name.endswith("#shape"))
    assert stored == packed_bytes(weight) == shape[0] * ((shape[1] + 7) // 8) + weight.count_nonzero() * dtype.itemsize


def test_only_where_it_is_smaller():
    # 64 columns: 8 bytes of bits a row, two weights' worth.
    tensors = {
        "w": pruned(4, 64, 4 * 62),
        "less": pruned(4, 64, 4 * 62 - 1),
        "bias": torch.zeros(9),
        "n": torch.zeros(3, 9).long(),
    }
    packed = pack(tensors)
    assert packed.keys() == {"w", "less#bits", "less#values", "less#shape", "bias", "n"}
    assert all(torch.equal(value, tensors[name]) for name, value in unpack(packed).items())
