"""masked_linear: against its formula in float64, its documented gradients, what it saves, and its messages."""

import pytest
import torch
from compressft_kernels.reference import masked_linear
from torch.nn import functional as F

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1, 1), (17, 63, 65), (65, 130, 17), (130, 17, 63), (63, 65, 130)]  # rows, in, out


def formula(x, weight, scores, bias, threshold, dy):
    """The result and all gradients, written out; dy^T x as sums of outer products."""
    x, weight, bias, dy = x.double(), weight.double(), bias.double(), dy.double()
    mask = torch.where(scores > torch.tensor(threshold, dtype=scores.dtype), 1.0, 0.0).double()
    kept = weight * mask
    y = (x.unsqueeze(-2) * kept).sum(-1) + bias
    outer = (dy.unsqueeze(-1) * x.unsqueeze(-2)).flatten(0, -3).sum(0)
    dx = (dy.unsqueeze(-1) * kept).sum(-2)
    return y, (dx, outer * mask, outer * weight, dy.flatten(0, -2).sum(0))


def check(close, gradients, x, weight, scores, bias, threshold, dtype):
    y, dy, grads = gradients(
        lambda x, w, s, b: masked_linear(x, w, s, threshold=threshold, bias=b), x, weight, scores, bias
    )
    want, wants = formula(x, weight, scores, bias, threshold, dy)
    close(y, want, dtype)
    for got, expected in zip(grads, wants, strict=True):
        close(got, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_equals_the_formula(random, close, gradients, size, dtype, threshold):
    rows, columns, out = size
    x, weight, scores, bias = (
        random(*s, dtype=dtype) for s in ((rows, columns), (out, columns), (out, columns), (out,))
    )
    check(close, gradients, x, weight, scores, bias, threshold, dtype)


def test_non_contiguous_and_broadcast_operands(random, close, gradients):
    x = random(5, 17, 3).transpose(0, 2).transpose(1, 2)  # (3, 5, 17), no stride 1 at its end
    weight, scores, bias = random(17, 9).t(), random(9, 1).expand(9, 17), random(1).expand(9)
    assert not x.is_contiguous() and not weight.is_contiguous() and 0 in scores.stride()
    check(close, gradients, x, weight, scores, bias, 0.0, torch.float64)
    check(close, gradients, random(17).expand(4, 17), random(1, 17).expand(9, 17), scores, bias, 0.0, torch.float64)


@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 0, 7), (2, 3, 4, 7)])
def test_any_leading_dimensions(random, close, gradients, shape):
    x, weight, scores, bias = random(*shape), random(5, 7), random(5, 7), random(5)
    y, dy, (dx, dw, ds, db) = gradients(lambda x, w, s, b: masked_linear(x, w, s, bias=b), x, weight, scores, bias)
    flat = x.reshape(-1, 7)
    want, (wx, ww, ws, wb) = formula(flat, weight, scores, bias, 0.0, dy.reshape(-1, 5))
    for got, expected in ((y, want.view(*shape[:-1], 5)), (dx, wx.view(shape)), (dw, ww), (ds, ws), (db, wb)):
        close(got, expected)


def test_the_comparison_is_strict_and_a_nan_score_drops(random):
    x, weight = torch.ones(1, 4, dtype=torch.float64), torch.tensor([[1.0, 2.0, 4.0, 8.0]], dtype=torch.float64)
    scores = torch.tensor([[0.01, 0.011, 0.009, float("nan")]], dtype=torch.float64)
    assert masked_linear(x, weight, scores, threshold=0.01).item() == 2.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_threshold_is_the_dense_layer_bit_for_bit(random, dtype):
    x, weight, scores, bias = (random(*s, dtype=dtype) for s in ((33, 65), (130, 65), (130, 65), (130,)))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    got, want = masked_linear(x, weight, scores, threshold=float("-inf"), bias=bias), F.linear(x, weight, bias)
    assert torch.equal(got, want)
    dy = random(33, 130, dtype=dtype)
    for a, b in zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        assert torch.equal(a, b)


def test_everything_masked_leaves_the_bias_and_still_teaches_the_scores(random, gradients):
    x, weight, scores, bias = random(4, 7), random(5, 7), random(5, 7), random(5)
    y, dy, (dx, dw, ds, _) = gradients(
        lambda x, w, s, b: masked_linear(x, w, s, threshold=float("inf"), bias=b), x, weight, scores, bias
    )
    assert torch.equal(y, bias.expand(4, 5))
    assert not dx.any() and not dw.any()
    torch.testing.assert_close(ds, (dy.t() @ x) * weight)
    assert ds.all()


def test_gradcheck(random):
    """On copies of the weight: gradcheck moves its operands through `.data`, which a kept weight cannot see."""
    scores = random(3, 4)
    leaves = [t.requires_grad_() for t in (random(2, 4), random(3, 4), random(3))]
    assert torch.autograd.gradcheck(lambda x, w, b: masked_linear(x, w.clone(), scores, bias=b), leaves)


def test_scores_get_the_surrogates_gradient(random):
    """The surrogate adds the scores to the mask; it is linear in them, so that central differences are exact."""
    x, weight, scores, dy = random(2, 4), random(3, 4), random(3, 4), random(2, 3)

    def surrogate(moved):
        return ((x @ (weight * ((scores > 0.1) + moved - scores)).t()) * dy).sum()

    want = torch.empty_like(scores)
    for i in range(3):
        for j in range(4):
            step = torch.zeros_like(scores)
            step[i, j] = 0.5
            want[i, j] = surrogate(scores + step) - surrogate(scores - step)
    leaf = scores.clone().requires_grad_()
    (got,) = torch.autograd.grad(masked_linear(x, weight, leaf, threshold=0.1), leaf, dy)
    torch.testing.assert_close(got, want)


def saved_by(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = function()
    return saved, y


def test_saves_its_operands_only(random):
    x, weight, scores, bias = (t.requires_grad_() for t in (random(6, 7), random(5, 7), random(5, 7), random(5)))
    pointers = {t.data_ptr() for t in (x, weight, scores)}
    saved, y = saved_by(lambda: masked_linear(x, weight, scores, bias=bias))
    assert {t.data_ptr() for t in saved} == pointers and len(saved) == 3
    y.sum().backward()
    naive, _ = saved_by(lambda: F.linear(x, weight * (scores > 0), bias))
    assert {t.data_ptr() for t in naive} - pointers  # the hook does see a masked weight that is saved


def test_only_what_requires_grad_gets_one(random):
    x, weight, scores, bias = random(2, 4), random(3, 4), random(3, 4).requires_grad_(), random(3)
    masked_linear(x, weight, scores, bias=bias).sum().backward()
    assert scores.grad is not None and x.grad is None and weight.grad is None and bias.grad is None
    assert not masked_linear(x, weight, scores.detach(), bias=bias).requires_grad


def test_a_second_derivative_is_refused(random):
    x, scores = random(2, 4).requires_grad_(), random(3, 4)
    (dx,) = torch.autograd.grad(masked_linear(x, random(3, 4), scores).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_changed_operand_before_backward_is_refused(random):
    x, weight, scores = random(2, 4), random(3, 4), random(3, 4).requires_grad_()
    y = masked_linear(x, weight, scores).sum()
    with torch.no_grad():
        scores.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_scores_may_have_a_dtype_of_their_own(random):
    x, weight = random(6, 7, dtype=torch.bfloat16), random(5, 7, dtype=torch.bfloat16)
    scores = random(5, 7, dtype=torch.float32).requires_grad_()
    y = masked_linear(x, weight, scores)
    y.sum().backward()
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad.double(), x.double().sum(0) * weight.double(), rtol=2e-2, atol=2e-2)
    assert scores.grad.dtype == torch.float32 and y.dtype == torch.bfloat16


def test_under_autocast_it_is_the_linear_layers_dtype(random):
    x, weight, scores, bias = (
        t.float().requires_grad_() for t in (random(6, 7), random(5, 7), random(5, 7), random(5))
    )
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_linear(x, weight, scores, bias=bias)
        want = F.linear(x, weight * (scores > 0), bias)
        same = masked_linear(x.double(), weight.double(), scores, bias=bias.double())
    assert torch.equal(y, want) and y.dtype == torch.bfloat16 and same.dtype == torch.float64
    grads = torch.autograd.grad(y.float().square().sum(), [x, weight, scores, bias])
    assert all(g.dtype == torch.float32 for g in grads)
    for got, expected in zip(
        (grads[0], grads[1], grads[3]), torch.autograd.grad(want.float().square().sum(), [x, weight, bias]), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_errors_name_the_shapes(random):
    x, weight, scores = random(2, 4), random(3, 4), random(3, 4)
    with pytest.raises(
        ValueError, match=r"masked_linear: x \(2, 5\), weight \(3, 4\), scores \(3, 4\) do not fit; want"
    ):
        masked_linear(random(2, 5), weight, scores)
    with pytest.raises(ValueError, match=r"scores \(4, 3\)"):
        masked_linear(x, weight, scores.t())
    with pytest.raises(ValueError, match=r"bias \(4,\) do not fit"):
        masked_linear(x, weight, scores, bias=random(4))
    with pytest.raises(ValueError, match=r"scores \(3, 4\) are torch.bool; want a floating dtype"):
        masked_linear(x, weight, scores > 0)
    with pytest.raises(ValueError, match=r"x torch.float32, weight torch.float64; want one floating dtype"):
        masked_linear(x.float(), weight, scores)
