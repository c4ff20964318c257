"""FLOPs from shapes against torch's counter, which watches the products themselves."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from compressft.methods.adapter import Adapter
from compressft.methods.fusion import Fusion
from compressft.methods.lsh_attention import LshAttention
from compressft.methods.probe import Probe
from compressft.methods.side import Side
from compressft.model.flops import flops
from compressft.model.shrink import drop_layers, narrow, shrink
from compressft.passes.structured import Structured
from compressft.transform import Context
from tests.methods.added import save_adapter
from tests.passes.test_structured_parts import architecture
from tests.tiny import TINY, random_keep, tiny

LENGTH = 11


def counted(model):
    ids = torch.randint(5, 90, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return counter.get_total_flops()


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "LM"])
@pytest.mark.parametrize("family", TINY)
def test_dense(family, head):
    model = tiny(family, architecture=architecture(family, head), attention="eager")
    assert flops(model, LENGTH) == counted(model)


@pytest.mark.parametrize("family", ["bert", "electra", "llama", "gpt2"])
def test_pruned(family):
    model = tiny(family, architecture=architecture(family, "ForSequenceClassification"), attention="eager")
    dense = flops(model, LENGTH)
    shrink(model, random_keep(model))
    narrow(model, torch.arange(3, 24))
    assert flops(model, LENGTH) == counted(model) < dense
    drop_layers(model, [1])
    assert flops(model, LENGTH) == counted(model)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_adapters_count(placement):
    """Their kernel is no product that the counter sees."""
    model = tiny(attention="eager")
    dense = flops(model, LENGTH)
    Adapter(placement=placement, size=5).prepare(model, Context())
    number = 4 if placement == "houlsby" else 2
    assert flops(model, LENGTH) == dense + number * 2 * (2 * 5 * 32) * LENGTH


def test_fusion_counts(tmp_path):
    folders = tuple(
        save_adapter(tmp_path / str(i), lambda: tiny(attention="eager"), seed=i, size=i + 3) for i in (0, 1)
    )
    model = tiny(attention="eager")
    Fusion(adapters=folders).prepare(model, Context())
    assert flops(model, LENGTH) == counted(model)


@pytest.mark.parametrize("kind", ["copy", "ladder"])
def test_side_networks_count(kind):
    model = tiny(attention="eager")
    Side(network=kind).prepare(model, Context())
    assert flops(model, LENGTH) == counted(model)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_hashed_attention_counts(family):
    model = tiny(family)
    LshAttention(chunk=4, rounds=3, buckets=6, look_back=2).prepare(model, Context())
    assert flops(model, LENGTH) == counted(model)


def test_an_lstm_counts():
    model = tiny()
    dense = flops(model, LENGTH)
    Probe(head="bilstm", size=5, cache=False).prepare(model, Context())
    # Four gates of 5 from 32 and from 5, each way, and back from 10 to 32.
    assert flops(model, LENGTH) == dense + 2 * (2 * 4 * 5 * (32 + 5) + 10 * 32) * LENGTH


def test_length_enters_squared_in_attention_alone():
    model = tiny()
    # 2 layers of 4 heads of 8, two products of two operations each.
    assert flops(model, 20) - 2 * flops(model, 10) == 4 * 2 * 32 * (400 - 200) - (2 * 32 * 32 + 2 * 32 * 3)


def test_masks_change_nothing_until_they_are_settled():
    model = tiny()
    dense = flops(model, LENGTH)
    Structured(heads=0.5, ffn=0.5, layers=0.5, hidden=0.5, align_hidden=4).prepare(model, Context())
    assert flops(model, LENGTH) == dense
