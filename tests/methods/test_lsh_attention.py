"""LSH attention: full attention where nothing is cut, the reference's numbers elsewhere, and a method to train."""

from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from compressft.errors import UserError
from compressft.export.fold import fold
from compressft.export.onnx import to_graph
from compressft.methods.lsh_attention import LshAttention
from compressft.methods.prefix import PrefixTuning
from compressft.model.anatomy import anatomy
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.modules.lsh import Lsh, Sight, hash_buckets, lsh_attention, unit
from compressft.objectives.distill import Distill
from compressft.passes.nf4 import Nf4
from compressft.passes.structured import Structured
from compressft.recipe.conflict import conflict
from compressft.recipe.recipe import parse_recipe
from compressft.run.flow import run
from compressft.transform import Context
from tests.methods.added import check_autocast
from tests.methods.universal import check_checkpointing, check_folders, check_resume
from tests.passes.sparse import classifier
from tests.passes.sparse import context as with_rows
from tests.tiny import SHAPE, batch_for, fit, labelled, logits, padded, tiny
from tests.tiny_folder import document, rows_of, save_tiny, write_jsonl

pytestmark = pytest.mark.dear

METHOD = LshAttention(chunk=4, rounds=2, buckets=4)
SHAPES = [(2, 3, 13, 8), (1, 1, 1, 2), (2, 1, 24, 5)]


def drawn(shape, seed=0):
    """qk and value in double precision."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def rotations(rounds, size, buckets, heads=1, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(heads, rounds, size, buckets // 2, generator=generator, dtype=torch.float64)


def attended(qk, value, hashing, mask=None, **sight):
    return lsh_attention(qk, value, hashing, Sight(**sight), mask)


def full(qk, value, allowed):
    """Shared-QK attention over all allowed pairs, by definition; oneself only where nobody else is there."""
    length = qk.shape[2]
    products = (qk @ unit(qk).transpose(-1, -2)).masked_fill(~allowed, -torch.inf)
    itself = torch.eye(length, dtype=torch.bool)
    alone = ~(allowed & ~itself).any(-1, keepdim=True)
    products = products.masked_fill(itself & ~alone, -torch.inf).masked_fill(itself & alone, 0.0)
    return products.softmax(-1) @ value


def everyone(length, causal):
    allowed = torch.ones(length, length, dtype=torch.bool)
    return allowed.tril() if causal else allowed


def seen(qk, hashing, chunk, look_back, causal, across, real=None):
    """Who sees whom in each round, (B, H, rounds, T, T), place by place."""
    buckets = hash_buckets(qk, hashing, real)
    length = qk.shape[2]
    allowed = torch.zeros(*buckets.shape, length, dtype=torch.bool)
    for index in torch.cartesian_prod(*map(torch.arange, buckets.shape[:3])).tolist():
        bucket = buckets[tuple(index)].tolist()
        order = sorted(range(length), key=lambda i: (bucket[i], i))
        for at, i in enumerate(order):
            for to, j in enumerate(order):
                if causal and not across:
                    near = bucket[i] == bucket[j] and 0 <= at - to <= look_back * chunk
                else:
                    near = 0 <= at // chunk - to // chunk <= look_back and (across or bucket[i] == bucket[j])
                allowed[(*index, i, j)] = near and (j <= i or not causal)
    return allowed


# The function.


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_chunk_is_full_attention(shape, causal):
    """(a), whatever the hashing says; in the leak-free form one bucket takes the place of one chunk."""
    qk, value = drawn(shape)
    want = full(qk, value, everyone(shape[2], causal))
    for rounds, look_back, chunk in ((1, 0, 32), (3, 0, shape[2]), (2, 1, 32)):
        hashing = rotations(rounds, shape[3], 4)
        got = attended(qk, value, hashing, chunk=chunk, look_back=look_back, causal=causal)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    one_bucket = torch.zeros(1, 2, shape[3], 2, dtype=torch.float64)
    got = attended(qk, value, one_bucket, chunk=shape[2], causal=causal, across_buckets=False)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("look_back", [1, 2])
@pytest.mark.parametrize(("causal", "across"), [(False, True), (False, False), (True, True), (True, False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_rounds_add_up_to_a_softmax_over_all_that_is_seen(shape, causal, across, look_back):
    """Against who sees whom by the definition: chunks, borders without wrap-around, duplicates, unsorting (b)."""
    qk, value = drawn(shape)
    hashing = rotations(3, shape[3], 4)
    got = attended(qk, value, hashing, chunk=4, look_back=look_back, causal=causal, across_buckets=across)
    union = seen(qk, hashing, 4, look_back, causal, across).any(2)
    torch.testing.assert_close(got, full(qk, value, union), atol=1e-12, rtol=1e-12)


def test_duplicates_count_once_per_round_without_the_correction():
    qk, value = drawn((1, 1, 12, 4))
    hashing = rotations(1, 4, 4).expand(-1, 3, -1, -1)
    once = attended(qk, value, hashing[:, :1], chunk=4)
    for correct in (True, False):
        # The same round thrice: every key three times, which a softmax does not see.
        torch.testing.assert_close(attended(qk, value, hashing, chunk=4, correct_duplicates=correct), once)
    several = rotations(3, 4, 4)
    with_it, without = (attended(qk, value, several, chunk=4, correct_duplicates=correct) for correct in (True, False))
    assert (with_it - without).abs().max() > 1e-2


def test_equal_vectors_share_a_bucket_and_near_ones_often_do():
    """(c)"""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(1, 1, 2000, 16, generator=generator), dim=-1)
    away = torch.nn.functional.normalize(torch.randn(x.shape, generator=generator), dim=-1)
    hashing = rotations(1, 16, 8).float()
    bucket = hash_buckets(x, hashing)
    assert bucket.unique().tolist() == list(range(8))
    rates = []
    for cosine in (-1.0, 0.0, 0.5, 0.9, 1.0):
        other = hash_buckets(cosine * x + (1 - cosine**2) ** 0.5 * away, hashing)
        rates.append(float((bucket == other).float().mean()))
    assert rates[0] == 0.0 and rates[-1] == 1.0
    assert all(later > before + 0.05 for before, later in pairwise(rates))
    assert torch.equal(hash_buckets(3.0 * x, hashing), bucket), "only the direction counts"


def test_more_rounds_come_nearer_to_full_attention():
    """(d)"""
    qk, value = drawn((4, 2, 64, 16))
    want = full(4.0 * qk, value, everyone(64, False))
    errors = []
    for rounds in (1, 2, 4, 8):
        got = [attended(4.0 * qk, value, rotations(rounds, 16, 8, seed=seed), chunk=8) for seed in range(5)]
        errors.append(float(torch.stack([(one - want).norm(dim=-1) for one in got]).median()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("look_back", [1, 2])
def test_later_tokens_change_nothing_before_them(look_back):
    """(e): also who is seen. The authors' chunks do not have this."""
    qk, value = drawn((2, 3, 29, 8))
    hashing = rotations(2, 8, 4)
    changes = []
    for across in (False, True):

        def attend(x, v, across=across):
            return attended(x, v, hashing, chunk=3, look_back=look_back, causal=True, across_buckets=across)

        before = attend(qk, value)
        for place in (1, 14, 28):
            other = [x.clone() for x in (qk, value)]
            for x in other:
                x[:, :, place] = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(place), dtype=x.dtype)
            difference = (attend(*other) - before).abs()
            changes.append((across, float(difference[:, :, :place].max())))
            assert difference[:, :, place].max() > 1e-2
    # Chunks begin elsewhere: the same numbers may be added up in another order.
    assert all(change < 1e-14 for across, change in changes if not across)
    assert any(change > 1e-3 for across, change in changes if across)


def reformer(heads: int, rounds: int, chunk: int, look_back: int, causal: bool):
    """The transformers library's own attention, eight values a head, four buckets, rotations from seed 5."""
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention, ReformerConfig

    config = ReformerConfig(
        hidden_size=8 * heads,
        attention_head_size=8,
        num_attention_heads=heads,
        num_hashes=rounds,
        num_buckets=4,
        lsh_attn_chunk_length=chunk,
        lsh_num_chunks_before=look_back,
        lsh_attention_probs_dropout_prob=0.0,
        is_decoder=causal,
        hash_seed=5,
    )
    return LSHSelfAttention(config, layer_idx=0).eval()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("chunk", [4, 32])
def test_agrees_with_transformers(padding, causal, chunk):
    """(f): LSHSelfAttention with the same rotations; it does not correct duplicates."""
    theirs = reformer(heads=3, rounds=2, chunk=chunk, look_back=0, causal=causal)
    x = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 16, dtype=torch.bool)
    if padding:
        mask[1, 11:] = False
    with torch.no_grad():
        want = theirs(x, attention_mask=mask).hidden_states.unflatten(-1, (3, 8)).transpose(1, 2)
        qk, value = (part(x).unflatten(-1, (3, 8)).transpose(1, 2) for part in (theirs.query_key, theirs.value))
        torch.manual_seed(5)
        hashing = torch.randn(3, 8, 2, 2).transpose(1, 2)
        allowed = mask[:, None, None, :].expand(-1, -1, 16, -1)
        got = attended(
            qk, value, hashing, chunk=chunk, look_back=0, mask=allowed, causal=causal, correct_duplicates=False
        )
    others = seen(qk, hashing, chunk, 0, causal, True, mask).any(2) & ~torch.eye(16, dtype=torch.bool)
    # -1e5 leaves them three digits where a token sees nobody else.
    alone = ~(others & allowed).any(-1) | ~mask[:, None]
    torch.testing.assert_close(got[~alone], want[~alone], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got[mask[:, None] & alone], want[mask[:, None] & alone], atol=1e-5, rtol=5e-3)


def test_agrees_with_transformers_on_earlier_chunks():
    """Its first chunk looks at the last one, the others as here."""
    theirs = reformer(heads=1, rounds=1, chunk=4, look_back=1, causal=False)
    x = torch.randn(1, 24, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = theirs(x).hidden_states[0]
        torch.manual_seed(5)
        hashing = torch.randn(1, 8, 1, 2).transpose(1, 2)
        qk, value = theirs.query_key(x)[:, None], theirs.value(x)[:, None]
        got = attended(qk, value, hashing, chunk=4)[0, 0]
    order = hash_buckets(qk, hashing)[0, 0, 0].argsort(stable=True)
    torch.testing.assert_close(got[order[4:]], want[order[4:]], atol=1e-5, rtol=1e-4)
    assert (got[order[:4]] - want[order[:4]]).abs().max() > 1e-2


def test_dropout_acts_on_probabilities():
    qk, value = drawn((1, 1, 16, 4))
    hashing = rotations(1, 4, 2)
    torch.manual_seed(0)
    rows = [attended(qk, value, hashing, chunk=16, dropout=0.5) for _ in range(400)]
    without = attended(qk, value, hashing, chunk=16)
    assert (rows[0] - without).abs().max() > 0.1
    torch.testing.assert_close(torch.stack(rows).mean(0), without, atol=0.25, rtol=0)


def test_gradients():
    qk, value = drawn((1, 2, 7, 3))
    hashing = rotations(2, 3, 2)

    def attend(x, v):
        return attended(x, v, hashing, chunk=3)

    assert torch.autograd.gradcheck(attend, [x.requires_grad_() for x in (qk, value)], eps=1e-7, atol=1e-5)


# The method.


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "llama", "qwen2", "qwen3", "gpt2"])
def test_trains_and_loads(family, tmp_path):
    model = tiny(family)
    batch = batch_for(family)
    batch["labels"] = batch["input_ids"] if hasattr(model, "lm_head") else torch.arange(4) % 3
    METHOD.prepare(model, with_rows())
    layer = anatomy(model).layers[0]
    site = layer.part(layer.family.attention)
    assert site.lsh.rotations.shape == (1, 2, SHAPE[family][2], 2)
    still = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        before = float(model(**batch).loss)
    fit(model, [METHOD], [batch], 12)
    with torch.no_grad():
        assert float(model(**batch).loss) < 0.8 * before
    moved = {name for name, value in model.state_dict().items() if not value.equal(still[name])}
    assert moved <= {name for name, value in model.named_parameters(remove_duplicate=False) if value.requires_grad}
    keys = [name for name in still if any(part in name for part in (".key.", "k_proj", "k_lin", "lsh.rotations"))]
    assert len(keys) >= 2 and not moved & set(keys)
    save_compressed(model, None, tmp_path, {})
    assert torch.equal(logits(load_compressed(tmp_path), batch), logits(model, batch))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_paddings_change_nothing(family):
    """Neither their number nor their side, beyond where places are counted from."""
    model, batch = classifier(family)
    LshAttention(chunk=3, rounds=2, buckets=4).prepare(model, Context())
    wide = {name: torch.nn.functional.pad(value, (0, 5)) for name, value in batch.items() if name != "labels"}
    torch.testing.assert_close(logits(model, wide), logits(model, batch), atol=1e-5, rtol=1e-4)
    if family == "llama":
        left = padded(4, left=True)
        right = padded(4)
        for row in range(4):
            length = int(right["attention_mask"][row].sum())
            left["input_ids"][row, -length:] = right["input_ids"][row, :length]
        places = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
        got = logits(model, {**left, "position_ids": places})
        torch.testing.assert_close(got, logits(model, right), atol=1e-5, rtol=1e-4)


def test_keys_are_not_read():
    model, batch = tiny(), labelled()
    METHOD.prepare(model, with_rows())
    before = logits(model, batch)
    with torch.no_grad():
        anatomy(model).layers[0].part("attention.self.key").weight.mul_(3.0)
    assert torch.equal(logits(model, batch), before)


def test_buckets_follow_the_longest_row():
    for method, wanted in ((LshAttention(chunk=4), 6), (LshAttention(chunk=64), 2), (LshAttention(buckets=8), 8)):
        model = tiny()
        method.prepare(model, with_rows())
        (first, *_) = (module for module in model.modules() if isinstance(module, Lsh))
        assert 2 * first.rotations.shape[-1] == wanted
    with pytest.raises(ValidationError, match="give an even number, such as 4"):
        LshAttention(buckets=3)


def test_layers_hash_differently_and_seeds_decide():
    found = []
    for seed in (0, 0, 1):
        model = tiny()
        METHOD.prepare(model, Context(seed=seed))
        found.append([module.rotations for module in model.modules() if isinstance(module, Lsh)])
    assert not torch.equal(found[0][0], found[0][1])
    assert torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][0], found[2][0])


def test_survives_what_every_method_has_to(tmp_path):
    for family in ("bert", "llama"):
        check_checkpointing(METHOD, family)
        check_autocast(METHOD, family)
    check_resume(METHOD, steps=6, others=[Structured(heads=0.5, ffn=0.5, align=8, floor_ffn=8, start=0.0, end=0.5)])
    check_folders(METHOD, tmp_path)


def test_goes_on_in_a_later_stage():
    model = tiny()
    for _ in range(2):
        METHOD.prepare(model, with_rows())
    assert sum(isinstance(module, Lsh) for module in model.modules()) == 2
    with pytest.raises(UserError, match="an earlier stage hashes otherwise"):
        LshAttention(chunk=5).prepare(model, with_rows())


def test_generates_without_a_cache():
    model = tiny("llama")
    METHOD.prepare(model, with_rows())
    ids = padded(2, 5)["input_ids"][:1]
    got = model.generate(input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    for _ in range(6):
        ids = torch.cat(
            [ids, logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[-1:].argmax(-1)[None]], 1
        )
    assert torch.equal(got, ids)
    with pytest.raises(ValueError, match="set use_cache to False"):
        model.generate(input_ids=ids, max_new_tokens=2, do_sample=False, pad_token_id=0, use_cache=True)


def test_refusals():
    with pytest.raises(UserError, match="single stack"):
        METHOD.prepare(tiny("t5"), Context())
    with pytest.raises(UserError, match="load it with compressft's load_model"):
        METHOD.prepare(tiny(attention="sdpa"), Context())
    model = tiny()
    PrefixTuning(length=2, hidden=4).prepare(model, Context())
    with pytest.raises(UserError, match="has a prefix"):
        METHOD.prepare(model, Context())
    assert "nf4" in conflict([METHOD, Nf4()])
    assert "distill.relations" in conflict([METHOD, Distill(teacher="self", relations=1.0)])
    assert conflict([METHOD, Distill(teacher="self")]) is None


def test_export_is_refused_before_any_work(tmp_path):
    save_tiny(tmp_path / "base")
    write_jsonl(tmp_path / "train.jsonl", rows_of(20))
    stages = [{"name": "only", "method": {"type": "lsh_attention", "chunk": 4}}]
    recipe = parse_recipe(document(tmp_path / "base", tmp_path / "train.jsonl", stages=stages))
    with pytest.raises(UserError, match=r"'lsh_attention' leaves a model that has no ONNX form; set export\.enabled"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    model = tiny()
    METHOD.prepare(model, with_rows())
    inputs = {name: value for name, value in labelled(2).items() if name != "labels"}
    with pytest.raises(Exception, match="has no ONNX form"):
        to_graph(fold(model), inputs)
