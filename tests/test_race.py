"""Step times side by side: who runs when, what is reported of whom, and what counts as saved for the backward pass."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import contestant, peers, race
from benchmarks.race import Conditions, Contestant, ratio

# Speaks as `benchmarks.contestant` does: package "fast" takes 1 ms a step, "slow" 2, "broken" none.
SPEAKER = """
import json, pathlib, sys
spec = json.loads(sys.argv[1])
log = pathlib.Path(spec["model"])
if spec["package"] == "broken":
    raise SystemExit("no such package")
print(json.dumps({"trained": 5, "saved_bytes": 7000000}), flush=True)
for line in sys.stdin:
    with log.open("a") as file:
        file.write(spec["package"] + line)
    ms = {"fast": 1.0, "slow": 2.0}[spec["package"]]
    print(json.dumps({"ms": [ms] * int(line), "peak_bytes": 9}), flush=True)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    speaker, log = tmp_path / "speaker.py", tmp_path / "log"
    speaker.write_text(SPEAKER)
    monkeypatch.setattr(race, "COMMAND", (str(speaker),))
    contestants = {name: Contestant(name, {}) for name in ("fast", "broken", "slow")}

    def run(rounds):
        out = io.StringIO()
        found = race.race(contestants, Conditions(str(log), rounds=rounds, steps=4, threads=1), Console(file=out))
        return found, log.read_text().split(), out.getvalue()

    return run


def test_contestants_take_turns(run):
    found, turns, shown = run(2)
    assert turns == ["fast3", "slow3", "fast4", "slow4", "fast4", "slow4"]
    assert found["fast"] == {
        "trained": 5,
        "saved_bytes": 7000000,
        "rounds": [1.0, 1.0],
        "peak_bytes": 9,
        "step_ms": 1.0,
    }
    assert found["broken"] == {"error": "no such package"}
    assert ratio(found["slow"], found["fast"]) == 2.0
    assert ratio(found["broken"], found["fast"]) is None
    assert "broken: no such package" in shown


def test_ratio_is_of_rounds_not_of_medians():
    # A machine that was busy in the first two rounds of three.
    assert ratio({"rounds": [20.0, 40.0, 3.0]}, {"rounds": [10.0, 20.0, 1.0]}) == 2.0


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))

    def forward(self, x):
        y = x @ self.weight.t()
        # Saves y twice, as a view too, and the weight.
        return (y * y).sum() + y.view(-1).exp().sum()


def test_saved_storages_count_once_and_parameters_not_at_all():
    model, found = Small(), {}
    x = torch.randn(4, 3, requires_grad=True)
    with contestant.counted(model, found):
        model(x).backward()
    # x, y and exp(y).
    assert sum(found.values()) == 4 * (4 * 3 + 4 * 5 + 4 * 5)


def test_families_compare_ours_with_theirs():
    found = peers.families(Path("python-of-theirs"))
    assert set(found) == {"Pfeiffer adapter", "Houlsby adapter", "Prefix", "LoRA", "DoRA"}
    for contestants in found.values():
        ours, *theirs = contestants.values()
        assert ours.package == "compressft" and theirs
        assert all((one.python == Path("python-of-theirs")) == (one.package == "adapters") for one in theirs)


def family(ours, *theirs):
    keys = ("saved_bytes", "ratio")
    return {"LoRA": {str(i): dict(zip(keys, one, strict=True)) for i, one in enumerate([ours, *theirs])}}


@pytest.mark.parametrize(
    ("results", "words"),
    [
        (family((5, 1.0), (5, 1.4), (9, 1.3)), ("quicker by the goal (1.30x", "saves no more")),
        (family((5, 1.0), (5, 1.0), (9, 2.0)), ("no slower (1.00x", "saves no more")),
        (family((6, 1.0), (5, 2.0), (9, 0.9)), ("**slower** (0.90x", "saves **more**")),
        ({"LoRA": {"0": {"error": "x"}, "1": {"saved_bytes": 1, "ratio": None}}}, ("not measured",)),
    ],
)
def test_verdicts(results, words):
    (line,) = peers.verdicts(results)
    assert all(word in line for word in words)
