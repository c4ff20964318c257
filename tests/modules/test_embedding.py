"""CompressedEmbedding: int8 rows with their own scale, a straight-through gradient, and the plain table when off."""

import torch
from torch import nn

from compressft.modules.embedding import CompressedEmbedding
from compressft.modules.int4 import fake_quantise
from compressft.modules.linear import dense


def tables():
    plain = nn.Embedding(20, 12, padding_idx=3)
    with torch.no_grad():
        plain.weight.copy_(torch.randn(20, 12, generator=torch.Generator().manual_seed(0)))
        plain.weight[4] *= 1000.0
        plain.weight[5] = 0.0
    return plain, CompressedEmbedding.of(plain)


IDS = torch.tensor([[0, 1, 2, 3], [4, 4, 5, 19]])


def test_rows_are_int8_within_half_a_step():
    plain, ours = tables()
    rows = plain.weight.detach()
    scale = rows.abs().amax(1, keepdim=True) / 127
    out = ours(IDS).detach()
    steps = out / torch.where(scale > 0, scale, 1.0)[IDS]
    assert (steps - steps.round()).abs().max() < 1e-4 and steps.abs().max() < 127.5
    # A row's scale is its own: the row of large values does not coarsen the others.
    assert ((out - rows[IDS]).abs() <= scale[IDS] * 0.5001).all()
    assert not torch.equal(out, rows[IDS])
    assert (out[1, 2] == 0).all()


def test_shares_the_table_and_its_padding():
    plain, ours = tables()
    assert ours.weight is plain.weight and ours.padding_idx == 3
    assert CompressedEmbedding.of(ours) is ours
    assert ours.state_dict().keys() == plain.state_dict().keys()


def test_gradient_is_straight_through():
    plain, ours = tables()
    out = torch.randn(*IDS.shape, 12, generator=torch.Generator().manual_seed(1))
    (want,) = torch.autograd.grad(plain(IDS), plain.weight, out)
    (got,) = torch.autograd.grad(ours(IDS), ours.weight, out)
    assert torch.equal(got, want)
    assert (got[3] == 0).all() and (got[4] == out[1, 0] + out[1, 1]).all()


def test_frozen_and_trained_tables_give_the_same_rows():
    _, ours = tables()
    trained = ours(IDS).detach()
    ours.weight.requires_grad_(False)
    assert torch.equal(ours(IDS), trained)


def test_off_is_the_plain_table():
    plain, ours = tables()
    with dense():
        assert torch.equal(ours(IDS), plain(IDS))
    assert not torch.equal(ours(IDS), plain(IDS))
    ours.active = False
    assert torch.equal(ours(IDS), plain(IDS))


def test_four_bit_rows_are_blocks_on_their_own_grid():
    plain, _ = tables()
    ours = CompressedEmbedding.of(plain, bits=4, block=8)
    out = ours(IDS)
    assert torch.equal(out.detach(), fake_quantise(plain.weight, 8, True)[IDS])
    assert not torch.equal(out, plain(IDS)) and (out[1, 2] == 0).all()
    dy = torch.randn(*IDS.shape, 12, generator=torch.Generator().manual_seed(1))
    (want,) = torch.autograd.grad(plain(IDS), plain.weight, dy)
    (got,) = torch.autograd.grad(out, plain.weight, dy)
    assert torch.equal(got, want)
    with dense():
        assert torch.equal(ours(IDS), plain(IDS))
    assert CompressedEmbedding.of(ours, 8) is ours and ours.bits == 8
