"""Task vectors and their codes: exact where they say so, as small as the formulas, for their own base alone."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compressft.errors import UserError
from compressft.methods.adapter import Adapter
from compressft.model.load import load_model
from compressft.model.saved.codes import Code, decode, encode
from compressft.model.saved.delta import base_tensors, save_delta
from compressft.model.saved.vectors import TaskVector
from compressft.model.shrink import shrink
from compressft.transform import Context
from tests.tiny import labelled, logits, random_keep, tiny

CODES = {
    "exact": Code(),
    "magnitude": Code("magnitude", density=0.1),
    "low_rank": Code("low_rank", rank=3),
    "sign": Code("sign"),
    "int8": Code("int8"),
}


def matrix(rows=24, columns=37, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 1e-3


def stored(parts):
    return sum(tensor.nbytes for name, tensor in parts.items() if name != "shape")


# Codes.


@pytest.mark.parametrize("name", CODES)
def test_bytes_of_a_code(name):
    rows, columns = 24, 37
    parts = encode(matrix(), CODES[name])
    kept = round(0.1 * rows * columns)
    wanted = {
        "exact": 4 * rows * columns,
        "low_rank": 4 * 3 * (rows + columns),
        "sign": rows * ((columns + 7) // 8) + 4 * rows,
        "int8": rows * columns + 4 * rows,
    }
    if name == "magnitude":
        assert 4 * kept < stored(parts) <= 4 * kept + rows * ((columns + 7) // 8)
    else:
        assert stored(parts) == wanted[name]
    assert decode(parts).shape == (rows, columns) and decode(parts).dtype == torch.float32


def test_one_bit_is_a_thirty_second():
    large = matrix(64, 4096)
    parts = encode(large, Code("sign"))
    assert parts["sign"].nbytes * 32 == large.nbytes
    assert stored(parts) < large.nbytes / 32 * 1.01


def test_exact_and_magnitude_keep_bits():
    d = matrix()
    assert torch.equal(decode(encode(d, Code())), d)
    back = decode(encode(d, CODES["magnitude"]))
    kept = back != 0
    assert int(kept.sum()) == round(0.1 * d.numel()) and torch.equal(back[kept], d[kept])
    assert d[~kept].abs().max() <= d[kept].abs().min()


def test_low_rank_is_the_nearest():
    d = matrix()
    back = decode(encode(d, CODES["low_rank"]))
    sizes = torch.linalg.svdvals(d.double())
    assert torch.linalg.matrix_rank(back.double(), rtol=1e-5) == 3
    assert float((d - back).norm()) == pytest.approx(float(sizes[3:].square().sum().sqrt()), rel=1e-4)
    exact = matrix(24, 3, 1) @ matrix(3, 37, 2)
    torch.testing.assert_close(decode(encode(exact, CODES["low_rank"])), exact, atol=1e-9, rtol=1e-4)


def test_sign_is_the_nearest_of_its_form():
    """For given signs the mean |entry| of a row minimises the squared error."""
    d = matrix()
    back = decode(encode(d, Code("sign")))
    assert torch.equal(torch.sign(back), torch.sign(d))
    assert all(len(row.abs().unique()) == 1 for row in back)
    error = float((d - back).square().sum())
    for factor in (0.99, 1.01):
        assert float((d - back * factor).square().sum()) > error


def test_int8_is_within_half_a_step():
    d = matrix()
    back = decode(encode(d, Code("int8")))
    step = d.abs().amax(1, keepdim=True) / 127
    assert ((back - d).abs() <= 0.5001 * step).all()
    assert torch.equal(back.abs().argmax(1), d.abs().argmax(1))


@pytest.mark.parametrize("name", CODES)
def test_nothing_stays_nothing(name):
    d = matrix()
    d[3] = 0.0
    if name != "low_rank":
        assert not decode(encode(d, CODES[name]))[3].any()
    assert not decode(encode(torch.zeros(5, 7), CODES[name])).any()
    bias = torch.randn(9)
    assert torch.equal(decode(encode(bias, CODES[name])), bias), "what is no matrix is exact"


def test_codes_ask_for_what_they_need():
    for wrong in (
        {"kind": "magnitude"},
        {"kind": "low_rank"},
        {"kind": "sign", "rank": 3},
        {"density": 0.5},
        {"kind": "magnitude", "density": 0.0},
        {"kind": "magnitude", "density": 1.5},
        {"kind": "low_rank", "rank": 0},
    ):
        with pytest.raises(UserError):
            Code(**wrong)


# Vectors.


@pytest.fixture
def base(tmp_path):
    tiny("bert", architecture="BertModel").save_pretrained(tmp_path / "base")
    return base_tensors(str(tmp_path / "base"))


def tuned(tmp_path, seed=1, size=1e-3, labels=3):
    """A fine-tuned model on the folder's base: one layer moved, some entries far, the embeddings not at all."""
    model = load_model(str(tmp_path / "base"), "AutoModelForSequenceClassification", num_labels=labels)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer.1." in name or "classifier" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * size).add_(noise * (noise > 2.5))
    return model.eval()


def test_exact_gives_back_the_bits(base, tmp_path):
    model = tuned(tmp_path)
    vector = TaskVector.between(base, model)
    assert vector.patches, "differences alone do not always give the bits back"
    whole = vector.apply(base)
    other = load_model(str(tmp_path / "base"), "AutoModelForSequenceClassification", num_labels=3)
    other.load_state_dict(whole, strict=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert all(torch.equal(vector.apply(base, 0.0)[name], base[name]) for name in base)
    assert not any("embeddings" in name or "layer.0" in name for name in vector.changes)
    assert set(vector.own) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("name", CODES)
def test_save_and_load(base, tmp_path, name):
    vector = TaskVector.between(base, tuned(tmp_path)).encode(CODES[name])
    vector.save(tmp_path / "v.safetensors")
    back = TaskVector.load(tmp_path / "v.safetensors")
    assert back.base == vector.base and back.changes.keys() == vector.changes.keys()
    one, other = vector.apply(base), back.apply(base)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    if name != "exact":
        assert all(torch.equal(one[key], base[key] + vector.difference(key)) for key in vector.changes)
    if name in ("sign", "int8"):
        matrices = [n for n in vector.changes if base[n].dim() == 2]
        size = sum(stored(back.changes[n]) for n in matrices)
        dense = sum(base[n].nbytes for n in matrices)
        rows = sum(4 * base[n].shape[0] for n in matrices)
        assert size == dense // (32 if name == "sign" else 4) + rows
    if name == "exact":
        assert back.patches.keys() == vector.patches.keys()


def test_another_base_is_refused(base, tmp_path):
    vector = TaskVector.between(base, tuned(tmp_path))
    changed = {**base, "bert.encoder.layer.0.output.dense.bias": base["bert.encoder.layer.0.output.dense.bias"] + 1e-3}
    with pytest.raises(UserError, match="another base"):
        vector.apply(changed)
    with pytest.raises(UserError, match="different bases"):
        vector + TaskVector.between(changed, tuned(tmp_path))


def test_arithmetic(base, tmp_path):
    one, two = TaskVector.between(base, tuned(tmp_path)), TaskVector.between(base, tuned(tmp_path, seed=2))
    total = one + two
    both, turned, scaled = total.apply(base), (two + one).apply(base), (0.3 * one).apply(base)
    of_one, of_less, negated, gone = one.apply(base), one.apply(base, 0.3), (-one).apply(base), (one - one).apply(base)
    assert one.changes
    for name in base:
        assert torch.equal(both[name], turned[name]), "commutative"
        assert torch.equal(scaled[name], of_less[name])
        assert torch.equal(gone[name], base[name])
        torch.testing.assert_close(negated[name], 2 * base[name] - of_one[name])
        if name in one.changes:
            assert torch.equal(both[name], base[name] + (one.difference(name) + two.difference(name)))
    assert torch.equal(total.own["classifier.bias"], one.own["classifier.bias"])
    assert not (one * 0.5).patches and not total.patches


def test_disjoint_vectors_add_up(base, tmp_path):
    """Two tasks that touch other tensors: the sum is both."""
    first, second = tuned(tmp_path).state_dict(), dict(base)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    second[name] = base[name] * 1.01
    one = TaskVector.between(base, {n: t for n, t in first.items() if n in base})
    two = TaskVector.between(base, second)
    both = (one + two).apply(base)
    torch.testing.assert_close(both[name], second[name])
    assert torch.equal(
        both["bert.encoder.layer.1.output.dense.bias"], one.apply(base)["bert.encoder.layer.1.output.dense.bias"]
    )


def test_heads_of_another_shape_are_no_hindrance(base, tmp_path):
    three, five = TaskVector.between(base, tuned(tmp_path)), TaskVector.between(base, tuned(tmp_path, 2, labels=5))
    assert (five + three).own["classifier.weight"].shape[0] == 5


def test_of_a_delta_folder(base, tmp_path):
    model = tuned(tmp_path)
    save_delta(model, None, base, tmp_path / "delta", {"model": str(tmp_path / "base")})
    one, other = TaskVector.of_delta(tmp_path / "delta").apply(base), TaskVector.between(base, model).apply(base)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_no_vector_is_refused(base, tmp_path):
    pruned = tuned(tmp_path)
    shrink(pruned, random_keep(pruned))
    with pytest.raises(UserError, match="between models of one shape"):
        TaskVector.between(base, pruned)
    adapted = tuned(tmp_path)
    Adapter(size=4).prepare(adapted, Context())
    with pytest.raises(UserError, match="no tensor of a plain model"):
        TaskVector.between(base, adapted)
    with pytest.raises(UserError, match="between models of one shape"):
        TaskVector.between(base, {name: tensor.bfloat16() for name, tensor in base.items()})
    save_file(dict(base), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="not a task vector"):
        TaskVector.load(tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="no readable"):
        TaskVector.load(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(UserError, match="no readable"):
        TaskVector.load(tmp_path / "text.safetensors")


def test_damaged_vectors_are_one_line(base, tmp_path):
    """Nothing is decoded that is not of the base's shape: two kilobytes may stand for terabytes."""
    path = tmp_path / "v.safetensors"
    TaskVector.between(base, tuned(tmp_path)).encode(Code("low_rank", rank=1)).save(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    left = next(name for name in tensors if name.endswith("#left"))
    name = left.partition("#")[0]
    huge = {left: torch.zeros(10**6, 1), f"{name}#right": torch.zeros(1, 10**6)}
    for changed, said in (
        (huge, rf"'{name}' is \(1000000, 1000000\), the base has \(64, 32\)|the base has \(32, "),
        ({"nowhere#exact": torch.zeros(2)}, r"'nowhere' is \(2,\), the base has no such tensor"),
    ):
        save_file({**tensors, **changed}, path, metadata)
        with pytest.raises(UserError, match=said):
            TaskVector.load(path).apply(base)
    for changed in ({f"{name}#odd": torch.zeros(1)}, {f"{name}#patch_places": torch.zeros(3, dtype=torch.int64)}):
        kept = {key: value for key, value in tensors.items() if not key.startswith(f"{name}#")}
        save_file({**kept, **changed}, path, metadata)
        with pytest.raises(UserError, match=f"v.safetensors: '{name}.* the file is damaged"):
            TaskVector.load(path)


def test_differences_of_half_precision_are_kept_in_fp32():
    one = {"w": torch.tensor([[256.0, 1.0]]).bfloat16()}
    two = {"w": torch.tensor([[258.0, 1.0078125]]).bfloat16()}
    vector = TaskVector.between(one, two)
    assert vector.difference("w").dtype == torch.float32
    assert torch.equal(vector.apply(one)["w"], two["w"]) and vector.apply(one)["w"].dtype == torch.bfloat16


def test_tied_weights_and_integers_are_taken_once(tmp_path):
    base = tiny("gpt2").state_dict()
    from compressft.model.saved.state import plain_state

    model = tiny("gpt2")
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    model.register_buffer("positions", torch.arange(4))
    vector = TaskVector.between(plain_state(tiny("gpt2"))[0], model)
    assert list(vector.changes) == ["transformer.wte.weight"]
    assert torch.equal(vector.own["positions"], torch.arange(4))
    assert "lm_head.weight" in base
    vector.save(tmp_path / "v.safetensors")
    assert set(load_file(tmp_path / "v.safetensors")) >= {"transformer.wte.weight#exact", "positions"}
    other = tiny("gpt2")
    other.load_state_dict(TaskVector.load(tmp_path / "v.safetensors").apply(plain_state(other)[0]), strict=False)
    assert torch.equal(logits(other, labelled()), logits(model, labelled()))
