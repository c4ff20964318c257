"""The probe's head: packed sequences' numbers, paddings on either side, standardising, its own generator."""

import pytest
import torch
from torch import nn

from compressft.modules.head import BiLSTM, HeadDesign, ProbeHead
from tests.tiny import padded


def packed(lstm, x, mask):
    """torch's own bidirectional LSTM on packed rows; right padding."""
    both = nn.LSTM(x.shape[2], lstm.size, batch_first=True, bidirectional=True)
    with torch.no_grad():
        for name, parameter in both.named_parameters():
            source = lstm.backwards if name.endswith("_reverse") else lstm.forwards
            parameter.copy_(source.get_parameter(name.removesuffix("_reverse")))
        lengths = mask.sum(1)
        rows = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(both(rows)[0], batch_first=True, total_length=x.shape[1])[0]


@torch.no_grad()
@pytest.mark.parametrize("left", [False, True])
def test_the_same_as_a_packed_sequence(left):
    lstm = BiLSTM(6, 3, torch.Generator().manual_seed(0))
    mask = padded(4, 9)["attention_mask"]
    x = torch.randn(4, 9, 6)
    want = packed(lstm, x, mask)
    if left:
        # The same rows with their paddings in front.
        given, place = torch.randn(4, 9, 6), mask.flip(1).bool()
        given[place] = x[mask.bool()]
        got = lstm(given, mask.flip(1))
        torch.testing.assert_close(got[place], want[mask.bool()], atol=1e-6, rtol=1e-5)
        assert got[~place].eq(0).all()
    else:
        torch.testing.assert_close(lstm(x, mask), want, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("body", ["linear", "mlp", "bilstm"])
def test_paddings_are_not_read(body):
    head = ProbeHead(HeadDesign(6, body, 4, False))
    mask, x = padded(4, 9)["attention_mask"], torch.randn(4, 9, 6)
    noise = torch.where(mask[..., None].bool(), x, 100 * torch.randn_like(x))
    real = mask.bool()
    torch.testing.assert_close(head(noise, mask)[real], head(x, mask)[real], atol=1e-6, rtol=1e-5)
    wide = nn.functional.pad(x, (0, 0, 0, 3)), nn.functional.pad(mask, (0, 3))
    torch.testing.assert_close(head(*wide)[:, :9][real], head(x, mask)[real], atol=1e-6, rtol=1e-5)
    assert head(x).shape == (4, 9, 6)


@torch.no_grad()
def test_every_token_reaches_every_token():
    lstm, x = BiLSTM(6, 3, torch.Generator().manual_seed(0)), torch.randn(1, 5, 6)
    mask = torch.ones(1, 5, dtype=torch.int64)
    before = lstm(x, mask)
    for place in range(5):
        other = x.clone()
        other[0, place] += 1
        moved = (lstm(other, mask) - before).abs()[0]
        # Forward states from there on, backward states up to there.
        assert moved[place:, :3].amin() > 0 and moved[: place + 1, 3:].amin() > 0
        assert moved[:place, :3].eq(0).all() and moved[place + 1 :, 3:].eq(0).all()


@torch.no_grad()
def test_standardising_and_the_mlp():
    head, x = ProbeHead(HeadDesign(4, "mlp", 7, True)), torch.randn(2, 3, 4)
    head.mean.copy_(torch.tensor([1.0, 2, 3, 4]))
    head.deviation.copy_(torch.tensor([1.0, 2, 1, 0.5]))
    want = head.outer(nn.functional.gelu(head.inner((x - head.mean) / head.deviation)))
    torch.testing.assert_close(head(x), want)
    assert set(head.state_dict()) >= {"mean", "deviation"}
    again = ProbeHead.rebuild(None, head.describe())
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in head.state_dict().items()}


def test_draws_from_its_own_generator():
    state = torch.get_rng_state()
    one, two = (
        ProbeHead(HeadDesign(6, "bilstm", 4, False), generator=torch.Generator().manual_seed(2)) for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one.lstm.forwards.weight_hh_l0.abs().max() <= 0.5 and one.outer is not None
