"""Several feeds in one stage: their shares, the order of their batches, their heads, and a resume to the bit."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from compressft.errors import UserError
from compressft.run.feed import LengthGroupedSampler
from compressft.run.mixed import HEADS, FeedHeads, Joined, MixedBatches, batches_of, fill_head, take_heads
from compressft.run.trainer import CompressionTrainer
from tests.run.killed import Killed, killed_and_resumed, trained
from tests.run.test_program import MASKED, base, recipe_of, saved  # noqa: F401 - base is a fixture
from tests.tiny import batch_for, tiny

# Cases share trainings.
pytestmark = pytest.mark.dear

BOTH = {
    "name": "both",
    "feeds": [{"data": "two"}, {"data": "texts", "task": MASKED, "share": 0.4}, {"data": "three", "share": 0.2}],
}
MIDDLE = {"name": "middle", "data": "three", "method": {"type": "probe"}}
LANGUAGE = {"name": "language", "data": "texts", "task": MASKED}


@pytest.mark.parametrize(
    ("sizes", "shares", "temperature", "batches"),
    [
        # The first feed's ten batches are half of the steps.
        ([100, 7], [None, 0.5], 1.0, [10, 10]),
        ([100, 7], [0.25, None], 1.0, [10, 30]),
        ([100, 300], [None, None], 1.0, [10, 30]),
        # 3 ** (1 / 2) as many; as many of each where the temperature is high.
        ([100, 300], [None, None], 2.0, [10, 17]),
        ([100, 300], [None, None], 1e6, [10, 10]),
        ([100, 300, 600], [None, None, 0.5], 1.0, [10, 30, 40]),
        ([101, 1], [None, None], 1.0, [11, 1]),
    ],
)
def test_shares_are_of_the_steps(sizes, shares, temperature, batches):
    assert batches_of(sizes, shares, 10, temperature) == batches


def test_shares_that_leave_nothing_are_refused():
    with pytest.raises(UserError, match=r"the shares are 1 together"):
        batches_of([10, 10, 10], [0.5, 0.5, None], 2, 1.0)


def mixed(sizes, counts, batch_size=4, seed=0):
    samplers = [LengthGroupedSampler([5 + i % 7 for i in range(size)], batch_size, seed) for size in sizes]
    return MixedBatches(samplers, counts, batch_size, seed)


def epoch_of(batches, epoch):
    batches.set_epoch(epoch)
    return list(batches)


def test_every_batch_is_of_one_feed_and_every_feed_has_its_number():
    batches, sizes = mixed([22, 9, 40], [6, 5, 2]), [22, 9, 40]
    starts = [0, 22, 31, 71]
    for epoch in range(3):
        found = epoch_of(batches, epoch)
        feeds = [{sum(index >= start for start in starts[1:]) for index in batch} for batch in found]
        assert all(len(feed) == 1 for feed in feeds)
        assert Counter(next(iter(feed)) for feed in feeds) == {0: 6, 1: 5, 2: 2}
        assert len(found) == len(batches) == 13
        first = sorted(index for batch in found for index in batch if index < sizes[0])
        assert first == list(range(22)), "the first feed's rows once an epoch"


def test_a_small_share_goes_on_where_it_stopped():
    """Ten batches of the second feed, two an epoch: after five epochs every row was seen once."""
    batches = mixed([8, 40], [2, 2])
    seen = Counter(index for epoch in range(5) for batch in epoch_of(batches, epoch) for index in batch if index >= 8)
    # Each epoch's order is one of its own, so that it is the pass that goes on, not the rows.
    assert sum(seen.values()) == 40
    assert set(seen) == set(range(8, 48))


def test_the_order_is_a_function_of_seed_and_epoch():
    assert epoch_of(mixed([20, 30], [5, 5]), 3) == epoch_of(mixed([20, 30], [5, 5]), 3)
    assert epoch_of(mixed([20, 30], [5, 5]), 3) != epoch_of(mixed([20, 30], [5, 5]), 2)
    assert epoch_of(mixed([20, 30], [5, 5]), 3) != epoch_of(mixed([20, 30], [5, 5], seed=1), 3)


def test_rows_say_whose_they_are():
    rows = Joined([[{"x": 1}, {"x": 2}], [{"x": 3}]])
    assert [rows[i] for i in range(len(rows))] == [{"x": 1, "feed": 0}, {"x": 2, "feed": 0}, {"x": 3, "feed": 1}]


def test_heads_are_the_models_children_and_leave_it_as_it_was():
    model, before = tiny(), {name: value.clone() for name, value in tiny().state_dict().items()}
    view = tiny("bert", architecture="BertForMaskedLM", seed=3)
    view.bert = model.bert
    view.tie_weights()
    model.add_module(HEADS, FeedHeads([view], model))
    names = set(dict(model.named_parameters()))
    assert f"{HEADS}.1.cls.predictions.transform.dense.weight" in names
    state = model.state_dict()
    pointers = [value.data_ptr() for name, value in state.items() if name.startswith(HEADS)]
    assert (
        len(pointers) == len(set(pointers))
        and state["bert.embeddings.word_embeddings.weight"].data_ptr() not in pointers
    )
    batch = batch_for("bert")
    expected = view(**batch).logits.detach()
    heads = take_heads(model)
    assert model.state_dict().keys() == before.keys() and take_heads(model) == {}
    again = tiny("bert", architecture="BertForMaskedLM", seed=9)
    again.bert = model.bert
    again.tie_weights()
    fill_head(again, heads[1])
    torch.testing.assert_close(again(**batch).logits.detach(), expected, rtol=0, atol=0)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("mixed") / "run"
    trained(recipe_of(base, BOTH, MIDDLE, LANGUAGE), folder)
    return folder


def test_heads_of_all_feeds_are_kept(whole):
    kept = load_file(whole / "stages" / "both" / "heads.safetensors")
    assert kept["2.classifier.weight"].shape == (3, 32)
    assert "1.cls.predictions.transform.dense.weight" in kept
    assert not any("decoder.weight" in name or "bert." in name for name in kept)
    assert saved(whole, "both")["classifier.weight"].shape == (2, 32)
    assert not any(name.startswith(HEADS) for name in saved(whole, "both"))


def test_a_later_stage_goes_on_with_a_feeds_head(base, tmp_path, monkeypatch):  # noqa: F811
    seen = {}

    def stop(self, *args, **kwargs):
        if any(t.type == "probe" for t in self.transforms):
            seen.update({name: value.clone() for name, value in self.model.state_dict().items()})
            raise Killed
        return train(self, *args, **kwargs)

    train = CompressionTrainer.train
    monkeypatch.setattr(CompressionTrainer, "train", stop)
    with pytest.raises(Killed):
        trained(recipe_of(base, BOTH, MIDDLE, LANGUAGE), tmp_path / "run")
    kept = load_file(tmp_path / "run" / "stages" / "both" / "heads.safetensors")
    assert torch.equal(seen["classifier.weight"], kept["2.classifier.weight"])


@pytest.mark.parametrize("at", [4, 9, 14])
def test_killed_amid_the_feeds_and_resumed(base, whole, tmp_path, at):  # noqa: F811
    recipe = recipe_of(base, BOTH, MIDDLE, LANGUAGE)
    killed_and_resumed(recipe, tmp_path / "run", at)
    for file in ("both/model", "both/heads", "middle/model", "language/model"):
        theirs, ours = (load_file(folder / "stages" / f"{file}.safetensors") for folder in (whole, tmp_path / "run"))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs), file


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"name": "a", "data": "two", "feeds": BOTH["feeds"]}, "each has its own task and data"),
        ({"name": "a", "feeds": BOTH["feeds"][:1]}, "one feed is the stage's task and data"),
        ({"name": "a", "feeds": [{"data": "two"}, {"data": "wto"}]}, r"feeds\.1\.data: 'wto' is no source"),
        ({"name": "a", "feeds": [{"data": "two"}, {"task": MASKED}]}, r"feeds\.1\.data: is required"),
        ({"name": "a", "feeds": [{"data": "two"}, {"data": "texts", "share": 1.5}]}, r"feeds\.1\.share: .*less than 1"),
    ],
)
def test_feeds_that_cannot_be_are_one_line(base, stage, said):  # noqa: F811
    with pytest.raises(UserError, match=said) as caught:
        recipe_of(base, stage)
    assert "\n" not in str(caught.value)
