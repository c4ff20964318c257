"""What stages compare around steps that must change nothing."""

import numpy as np
import pytest

from compressft.errors import VerificationError
from compressft.evaluation.logits import model_logits
from compressft.run.stage import SETTLE_PIECES, settled, unchanged
from compressft.tasks import make_task
from tests.tiny import LABELS, tiny


class Pads:
    """The one thing that collating asks of a tokenizer."""

    pad_token_id = 0


ROWS = [{"input_ids": list(range(5, 5 + n)), "attention_mask": [1] * n} for n in (3, 7, 4, 5)]


def test_of_a_vocabulary_some_pieces_are_compared():
    task = make_task("causal-lm", Pads(), 16)
    model = tiny("llama", architecture="LlamaForCausalLM", vocab_size=1000)
    for some, whole in zip(settled(model, task, ROWS, 3), model_logits(model, task, ROWS, 3), strict=True):
        assert some.shape[-1] == 250 <= SETTLE_PIECES
        np.testing.assert_array_equal(some, whole[:, ::4])


def test_of_labels_all_are_compared():
    task = make_task("sequence-classification", Pads(), 16, [str(i) for i in range(LABELS)])
    model = tiny("bert")
    before = settled(model, task, ROWS, 2)
    for some, whole in zip(before, model_logits(model, task, ROWS, 2), strict=True):
        np.testing.assert_array_equal(some, whole)
    unchanged("nothing", before, settled(model, task, ROWS, 2))
    model.classifier.weight.data[0] *= 2
    with pytest.raises(VerificationError, match="a step changed the logits"):
        unchanged("a step", before, settled(model, task, ROWS, 2))
