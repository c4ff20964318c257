"""Learned gates: noise, expectation, the constraint's pressure, and a model that ships its fractions."""

import math
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn

from compressft.model.anatomy import anatomy
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.model.shrink import shapes
from compressft.model.surgery import checkpoint_activations
from compressft.modules.concrete_gate import HIGHEST, INITIAL, LOWEST, ConcreteGate
from compressft.modules.lagrange import Lagrange
from compressft.passes.int8 import Int8
from compressft.passes.shared.parts import Parts
from compressft.passes.shared.sparsity import expected_sparsity, settle
from compressft.passes.structured import Structured
from compressft.transform import Context
from tests.passes.test_structured_parts import architecture, data, nothing_left
from tests.tiny import logits, tiny

EVERYTHING = ("heads", "ffn", "layers", "hidden")
ROUNDING = {"align": 4, "floor_ffn": 4, "align_hidden": 4}


def learner(**fields):
    settings = {"decide": "learned", "sparsity": 0.6, "gates": EVERYTHING, "start": 0.0, "end": 0.6, **ROUNDING}
    return Structured(**{**settings, **fields})


def gate_of(groups=6, size=1, seed=0):
    return ConcreteGate(groups, size, torch.Generator().manual_seed(seed))


def prepared(family, transforms, **changes):
    """A model, its batch, the context and an optimiser with the transforms' own groups."""
    model = tiny(family, architecture=architecture(family, "ForSequenceClassification"), **changes)
    context = Context(transforms=transforms)
    for transform in transforms:
        transform.prepare(model, context)
    own = [group for t in transforms for group in t.param_groups(model, context)]
    taken = {id(p) for group in own for p in group["params"]}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return model, data(family), context, torch.optim.AdamW([{"params": rest}, *own], lr=1e-2)


def train(prepared, transforms, first, last, steps):
    """Steps first..last of `steps`, hooks called as the trainer does."""
    model, batch, context, optimiser = prepared
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for transform in transforms:
        transform.after_step(model, first / steps)
    for step in range(first, last):
        model.train()
        outputs = model(**batch)
        loss = outputs.loss
        for transform in transforms:
            loss = loss + sum(transform.loss(model, batch, outputs, context).values())
        loss.backward()
        optimiser.step()
        for transform in transforms:
            transform.after_step(model, (step + 1) / steps)
        optimiser.zero_grad()
    return model.eval()


def test_training_is_noisy_and_differentiable_evaluation_is_not():
    gate = gate_of(size=2)
    gate.sampling = True
    with torch.no_grad():
        gate.log_alpha.zero_()
    z = gate.train().columns()
    assert z.shape == (12,) and torch.equal(z[::2], z[1::2]) and torch.equal(z, gate.columns()), "one draw per step"
    z.sum().backward()
    assert (gate.log_alpha.grad[(z[::2] > 0) & (z[::2] < 1)] > 0).all()
    gate.advance()
    assert not torch.equal(gate.columns(), z)
    assert gate.eval().columns().tolist() == [1.0] * 12
    gate.settle(torch.tensor([1, 4]))
    assert torch.nonzero(gate.columns()).flatten().tolist() == [2, 3, 8, 9]
    assert gate.columns()[2] == pytest.approx(0.5) and not gate.columns().requires_grad


def test_open_probability_is_the_share_of_open_draws():
    gate = gate_of(6)
    gate.sampling = True
    with torch.no_grad():
        gate.log_alpha.copy_(torch.tensor([-4.0, -2.0, -1.0, 0.0, 1.0, 3.0]))
    gate.log_alpha.grad = torch.zeros(6)
    torch.manual_seed(0)
    opened = torch.zeros(6)
    for _ in range(3000):
        gate.advance()
        opened += (gate.columns() > 0).float().detach()
    assert (opened / 3000 - gate.probability()).abs().max() < 4 * 0.5 / 3000**0.5


def test_advance_clamps_and_waits_for_a_step():
    gate = gate_of(2)
    noise = gate.noise.clone()
    gate.advance()
    assert torch.equal(gate.noise, noise), "nothing has been learned since"
    with torch.no_grad():
        gate.log_alpha.copy_(torch.tensor([-9.0, 9.0]))
    gate.log_alpha.grad = torch.zeros(2)
    gate.advance()
    assert gate.log_alpha.tolist() == pytest.approx([math.log(0.01), math.log(100.0)])
    assert pytest.approx(-HIGHEST) == LOWEST and not torch.equal(gate.noise, noise)


@pytest.mark.parametrize(("sparsity", "grows"), [(0.2, True), (0.8, False)])
def test_pressure_grows_while_the_target_is_missed(sparsity, grows):
    """The multipliers ascend: below the target ever more is gained by pruning, above it ever less."""
    constraint = Lagrange()
    constraint.target.fill_(0.5)
    optimiser = torch.optim.SGD(constraint.parameters(), lr=0.5)
    pressures = []
    for _ in range(5):
        s = torch.tensor(sparsity, requires_grad=True)
        optimiser.zero_grad()
        constraint(s).backward()
        pressures.append(-float(s.grad))
        optimiser.step()
    assert pressures[0] == 0.0
    steps = [b - a for a, b in pairwise(pressures)]
    assert all((step > 0) == grows for step in steps)
    linear, quadratic = constraint.linear.item(), constraint.quadratic.item()
    assert (linear < 0) == grows and quadratic > 0


def test_constraint_is_the_formula():
    constraint = Lagrange()
    with torch.no_grad():
        constraint.target.fill_(0.5)
        constraint.linear.fill_(-2.0)
        constraint.quadratic.fill_(3.0)
    assert constraint(torch.tensor(0.3)).item() == pytest.approx(-2 * -0.2 + 3 * 0.04)


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_expected_sparsity_of_the_model_is_the_mean_of_its_draws(family):
    one = learner()
    model, *_ = prepared(family, [one])
    parts = Parts.of(model, "structured")
    generator = torch.Generator().manual_seed(1)
    for gate in parts.concrete():
        gate.sampling = True
        gate.log_alpha.data.uniform_(-3, 3, generator=generator)
        gate.log_alpha.grad = torch.zeros_like(gate.log_alpha)
    model.train()
    torch.manual_seed(0)
    drawn = []
    for _ in range(600):
        values = []
        for gate in parts.concrete():
            gate.advance()
            values.append((gate.columns()[:: gate.size] > 0).float().detach())
        drawn.append(float(parts.measured(values)))
    error = float(torch.tensor(drawn).std()) / len(drawn) ** 0.5
    assert abs(sum(drawn) / len(drawn) - expected_sparsity(parts).item()) < 4 * error < 0.1
    # Everything open: what is counted are the layers' matrices.
    matrices = sum(p.numel() for x in anatomy(model).layers for n, p in x.module.named_parameters() if p.dim() == 2)
    heads, ffn = parts.costs()
    per_dim = sum(x.kv_heads * h + x.ffn * f for x, h, f in zip(parts.anatomy, heads, ffn, strict=True))
    assert matrices == per_dim * parts.width


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("family", ["bert", "electra", "llama", "gpt2"])
def test_training_ships_what_it_evaluates(family, uniform, tmp_path):
    steps = 40
    one = learner(uniform=uniform)
    ready = prepared(family, [one])
    model, batch = ready[0], ready[1]
    before = sum(p.numel() for x in anatomy(model).layers for n, p in x.module.named_parameters() if p.dim() == 2)
    train(ready, [one], 0, steps, steps)
    want = logits(model, batch)
    now = one.status(model, 1.0)["sparsity"]
    assert abs(now["now"] - 0.6) < (0.15 if uniform else 0.05), "as near as the rounding lets it"
    hidden = Parts.of(model, "structured").hidden.mask
    assert ((hidden > 0) & (hidden < 1)).any(), "fractions are kept"
    one.finalize(model)
    torch.testing.assert_close(logits(model, batch), want, atol=1e-5, rtol=1e-5)
    nothing_left(model)
    after = sum(p.numel() for x in anatomy(model).layers for n, p in x.module.named_parameters() if p.dim() == 2)
    assert 1 - after / before == pytest.approx(now["now"], abs=1e-6)
    assert anatomy(model).width % 4 == 0 and all(x["ffn"] % 4 == 0 for x in shapes(model))
    if uniform:
        assert len({tuple(x.values()) for x in shapes(model)}) == 1
    save_compressed(model, None, tmp_path / "model", {})
    assert torch.equal(logits(load_compressed(tmp_path / "model"), batch), logits(model, batch))


def test_beside_int8_with_recomputed_layers():
    one, int8 = learner(), Int8()
    ready = prepared("bert", [one, int8])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        checkpoint_activations(ready[0])
    model = train(ready, [one, int8], 0, 20, 20)
    want = logits(model, ready[1])
    for transform in (one, int8):
        transform.finalize(model)
    torch.testing.assert_close(logits(model, ready[1]), want, atol=1e-5, rtol=1e-5)


def test_gates_rest_before_the_start_and_after_the_end():
    one = learner(start=0.3, end=0.7)
    ready = prepared("bert", [one])
    model, batch = ready[0], ready[1]
    dense = logits(tiny(), batch)
    torch.testing.assert_close(logits(model, batch), dense, atol=1e-5, rtol=1e-5)
    parts = Parts.of(model, "structured")
    train(ready, [one], 0, 6, 20)
    assert all((gate.mask == 1).all() and (gate.log_alpha == INITIAL).all() for gate in parts.concrete())
    train(ready, [one], 6, 14, 20)
    settled = [(gate.mask.clone(), gate.log_alpha.detach().clone()) for gate in parts.concrete()]
    assert int(parts.constraint.settled) and not parts.sampling
    train(ready, [one], 14, 20, 20)
    for gate, (mask, log_alpha) in zip(parts.concrete(), settled, strict=True):
        assert torch.equal(gate.mask, mask) and torch.equal(gate.log_alpha, log_alpha)


@pytest.mark.parametrize("at", [5, 13])
def test_a_resumed_run_is_the_same(at):
    one, steps = learner(), 16

    def start(seed):
        return prepared("bert", [one], seed=seed)

    straight = start(0)
    torch.manual_seed(0)
    train(straight, [one], 0, steps, steps)
    first, resumed = start(0), start(1)
    torch.manual_seed(0)
    train(first, [one], 0, at, steps)
    resumed[0].load_state_dict(first[0].state_dict())
    resumed[3].load_state_dict(first[3].state_dict())
    train(resumed, [one], at, steps, steps)
    for (name, a), b in zip(straight[0].state_dict().items(), resumed[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_settling_meets_the_target_wherever_training_ended():
    one = learner()
    model, *_ = prepared("bert", [one], num_hidden_layers=6)
    parts = Parts.of(model, "structured")
    generator = torch.Generator().manual_seed(2)
    for gate in parts.concrete():
        gate.log_alpha.data.uniform_(-1, 4, generator=generator)
    settle(parts, one, None)
    free = float(parts.sparsity())
    for target in (0.3, 0.5, 0.7, 0.9):
        settle(parts, one, target)
        assert abs(float(parts.sparsity()) - target) < 0.03, (target, free)
    assert all(bool((gate.mask == gate.mask.round()).all()) for gate in parts.layers), "a layer is there or not"


def test_own_groups_hold_gates_and_multipliers_without_decay():
    one = learner(gate_lr=0.07)
    model = tiny()
    one.prepare(model, Context())
    group, linear = one.param_groups(model, Context())
    assert group["lr"] == pytest.approx(10 * linear["lr"]) == 0.07
    assert group["weight_decay"] == linear["weight_decay"] == 0.0
    # Two layers' heads, neurons and layer gates, the hidden gate and the quadratic multiplier.
    assert len(group["params"]) == 2 * 3 + 1 + 1 and all(p.requires_grad for p in group["params"])
    assert linear["params"][0] is Parts.of(model, "structured").constraint.linear
    assert Structured(ffn=0.5).param_groups(model, Context()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decide": "learned"}, "structured.sparsity: is 0"),
        ({"decide": "learned", "sparsity": 0.5, "ffn": 0.5}, "structured.ffn: learned gates divide one budget"),
        ({"decide": "learned", "sparsity": 0.5, "gates": ()}, "structured.gates: is empty"),
        ({"ffn": 0.5, "sparsity": 0.5}, "structured.sparsity: is for learned gates"),
        ({"decide": "learned", "sparsity": 0.5}, None),
        ({"hidden": 0.5}, None),
        ({"layers": 0.5}, None),
    ],
)
def test_contradictions_name_the_fix(fields, message):
    found = Structured(**fields).check()
    assert found is None if message is None else message in found
