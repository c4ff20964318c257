"""Batches of similar length, and logits in the rows' own order."""

import numpy as np
import pytest

from compressft.evaluation.logits import batches_by_length, open_session, session_logits


@pytest.mark.parametrize("batch", [1, 5, 12, 100])
def test_batches_hold_every_row_once(exported, batch):
    features = exported("int8").features
    batches = batches_by_length([len(row["input_ids"]) for row in features], batch)
    assert sorted(i for b in batches for i in b) == list(range(12))
    assert [len(b) for b in batches[:-1]] == [batch] * (len(batches) - 1)
    lengths = [len(features[i]["input_ids"]) for b in batches for i in b]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("kind", ["int8", "tokens"])
@pytest.mark.parametrize("batch", [1, 5])
def test_logits_are_in_the_order_of_rows(exported, kind, batch):
    model = exported(kind)
    found = session_logits(open_session(model.path, threads=1), model.task, model.features, batch)
    for one, other, feature in zip(found, model.logits(1), model.features, strict=True):
        assert one.shape == ((len(feature["input_ids"]), 3) if kind == "tokens" else (3,))
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
