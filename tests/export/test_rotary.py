"""Rotary positions whose frequencies are scaled: the file is torch's at every length, or refused before training."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from compressft.errors import UserError
from compressft.evaluation.logits import feed, open_session
from compressft.export.cache import with_cache
from compressft.export.continuation import Chunk, model_chunks, session_chunks
from compressft.export.fold import fold
from compressft.export.onnx import save, to_graph
from compressft.export.refuse import refuse_lengths
from compressft.export.rotary import DynamicRotary, mixed_lengths
from compressft.recipe.recipe import parse_recipe
from tests.share import drawn
from tests.tiny import padded, tiny
from tests.tiny_folder import document

pytestmark = pytest.mark.dear

ORIGINAL, MOST = 12, 40
SCALED = {"rope_theta": 100.0, "factor": 10 / 3}
PRETRAINED = {**SCALED, "original_max_position_embeddings": ORIGINAL}
KINDS = {
    "linear": SCALED,
    "dynamic": SCALED,
    "yarn": PRETRAINED,
    "llama3": {**PRETRAINED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {**PRETRAINED, "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]},
}


def scaled(kind):
    rope = {"rope_type": kind, **KINDS[kind]}
    return tiny("llama", num_hidden_layers=1, rope_parameters=rope, max_position_embeddings=MOST)


@pytest.mark.parametrize("kind", drawn(1, KINDS, ("dynamic",)))
def test_every_length_is_torchs(kind, tmp_path):
    model, plain = scaled(kind), tiny("llama", num_hidden_layers=1, max_position_embeddings=MOST)
    plain.load_state_dict(model.state_dict())
    # Traced below the original length.
    save(to_graph(fold(model), with_cache(model, padded(2, 4))), tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx", 1)
    for length in (2, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, MOST, MOST + 9):
        batch = padded(3, length)
        real = batch["attention_mask"].bool().numpy()
        with torch.no_grad():
            want, other = model(**batch).logits.numpy(), plain(**batch).logits.numpy()
        got = session.run(["logits"], feed(session, batch))[0]
        np.testing.assert_allclose(got[real], want[real], atol=2e-5, rtol=1e-4)
        assert kind == "dynamic" or np.abs(want - other)[real].max() > 0.01, "the kind matters"
    # A text that grows past both lengths in the cache.
    ids, places = padded(1, MOST + 9)["input_ids"].numpy(), np.arange(MOST + 9)[None]
    cuts = (0, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, MOST, MOST + 1, MOST + 9)
    parts = [Chunk(ids[:, a:b], np.ones((1, b), np.int64), places[:, a:b]) for a, b in pairwise(cuts)]
    np.testing.assert_allclose(session_chunks(session, parts), model_chunks(model, parts), atol=2e-5, rtol=1e-4)


def test_dynamic_frequencies_are_those_of_the_length():
    rotary = scaled("dynamic").model.rotary_emb
    mine, x = DynamicRotary(rotary), torch.zeros(1, 1, 1)
    for length in (MOST, MOST + 1, 2 * MOST, 5):
        places = torch.arange(length)[None]
        for got, want in zip(mine(x, places), rotary(x, places), strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "lengths", "limit"),
    [
        ("dynamic", [3, MOST], None),
        ("dynamic", [MOST + 1, MOST + 1], MOST),
        ("longrope", [3, ORIGINAL], None),
        ("longrope", [ORIGINAL + 1, MOST], None),
        ("longrope", [ORIGINAL, ORIGINAL + 1], ORIGINAL),
        ("yarn", [3, MOST], None),
        ("longrope", [], None),
    ],
)
def test_rows_that_would_depend_on_their_batch_are_refused(kind, lengths, limit):
    model = scaled(kind)
    recipe = parse_recipe(document("x", "y"))
    if limit is None:
        assert mixed_lengths(model.config, lengths) is None
        refuse_lengths(recipe, model, lambda: lengths)
        return
    with pytest.raises(UserError, match=f"a row has {max(lengths)} tokens, and beyond {limit} .*set it to {limit}"):
        refuse_lengths(recipe, model, lambda: lengths)
    refuse_lengths(parse_recipe(document("x", "y", export={"enabled": False})), model, lambda: lengths)
    # So it is: alone it gets the frequencies of its own length.
    ids = torch.randint(5, 90, (2, max(lengths)))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    with torch.no_grad():
        together, alone = model(input_ids=ids, attention_mask=mask).logits, model(input_ids=ids[:1, :5]).logits
    assert (together[0, :5] - alone[0]).abs().max() > 1e-3


def test_a_model_without_rotary_positions_has_no_such_lengths():
    recipe = parse_recipe(document("x", "y"))
    refuse_lengths(recipe, tiny("bert"), lambda: pytest.fail("nobody asked"))
