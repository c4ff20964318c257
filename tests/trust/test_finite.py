"""Numbers that are none: the message says whether the base, an update or the loss made them."""

import math

import pytest
import torch
from torch import nn

from compressft.errors import UserError
from compressft.model.finite import broken_term, broken_weight
from compressft.model.load import load_model
from compressft.recipe.recipe import parse_recipe
from compressft.run.flow import run
from tests.tiny_folder import document, rows_of, save_tiny, write_jsonl


@pytest.fixture
def trained(tmp_path):
    """Runs one full stage on a tiny model with these training settings."""
    base, data = save_tiny(tmp_path / "base"), write_jsonl(tmp_path / "rows.jsonl", rows_of())

    def trained(**train):
        settings = {"batch_size": 8, "save": "no", "warmup": 0.0, **train}
        recipe = document(base, data, stages=[{"name": "only", "train": settings}], export={"enabled": False})
        return run(parse_recipe(recipe, "tiny"), tmp_path / "run")

    return trained


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_base(tmp_path, value):
    folder = save_tiny(tmp_path / "base")
    model = load_model(str(folder))
    assert broken_weight(model) is None
    with torch.no_grad():
        model.get_parameter("encoder.layer.1.output.dense.weight")[3, 5] = value
    model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"model: '.*base' holds a NaN or an infinity in encoder\.layer\.1\.output\."):
        load_model(str(folder))


UPDATE = r"the update of step {} left a NaN or an infinity in \S+; lower"
LOSS = r"the loss \(task\) became nan at step {}, all weights being finite"


@pytest.mark.dear
@pytest.mark.parametrize(
    ("train", "said"),
    [
        # Known after the last step, and before the next one.
        ({"max_steps": 1, "learning_rate": 1e39}, UPDATE.format(1)),
        ({"max_steps": 3, "learning_rate": 1e39}, UPDATE.format(1)),
        ({"max_steps": 3, "weight_decay": 1e300}, UPDATE.format(1) + r".* train.weight_decay \(now 1e\+300\)"),
        # Weights of 1e30 are numbers; what they give is none.
        ({"max_steps": 3, "learning_rate": 1e30}, LOSS.format(2)),
    ],
)
def test_training(trained, train, said):
    with pytest.raises(UserError, match=f"^train: .*{said}"):
        trained(**train)


def test_the_term_that_broke_is_named():
    fine, none = torch.tensor(1.0), torch.tensor(math.nan)
    assert broken_term({"task": fine, "distill": none}) == ("distill", pytest.approx(math.nan, nan_ok=True))
    assert broken_term({"task": fine, "l0": torch.tensor(math.inf)}) == ("l0", math.inf)
    assert broken_term({"task": fine}) is None


def test_numbers_that_cannot_break_are_left_out():
    model = nn.Linear(2, 2)
    model.register_parameter("count", nn.Parameter(torch.tensor([1]), requires_grad=False))
    assert broken_weight(model) is None
