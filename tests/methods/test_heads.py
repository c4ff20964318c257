"""Every method on token classification and regression, in bf16, and with activations computed again."""

import pytest

from compressft.methods.fusion import Fusion
from tests.methods.added import check_autocast, headed, save_adapter
from tests.methods.test_methods import CASES, HEAD
from tests.methods.universal import check_checkpointing, check_learns
from tests.share import drawn
from tests.tiny import tiny

pytestmark = pytest.mark.dear

NAMES = [*CASES, "fusion"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two adapters of the tiny BERT, for the heads' models and for the classifier."""
    folder = tmp_path_factory.mktemp("adapters")

    def save(name, base):
        return Fusion(adapters=tuple(save_adapter(folder / f"{name}-{i}", base, seed=i) for i in (0, 1)), dropout=0.0)

    return save


def method_for(name, head, saved):
    if name != "fusion":
        return CASES[name]
    return saved(head, tiny if head == "classes" else lambda: headed("bert", head))


@pytest.mark.parametrize("head", ["token", "regression"])
@pytest.mark.parametrize("name", drawn(6, NAMES))
def test_learns(name, head, saved):
    check_learns(method_for(name, head, saved), head, alone=name not in HEAD)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_and_recomputed_activations(name, saved):
    method = method_for(name, "classes", saved)
    check_autocast(method)
    check_checkpointing(method)
