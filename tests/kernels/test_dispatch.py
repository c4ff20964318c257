"""Which path an operation takes where: the rules, the table's rows, and what `explain` says."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from compressft_kernels import (
    adapter,
    block_sparse_linear,
    dispatch,
    explain,
    masked_linear,
    packed_linear,
    prefix_attention,
    reference,
)
from compressft_kernels.dispatch import OPERATIONS, TABLE, configuration, limit, pretending, table_of, unsupported
from compressft_kernels.launch_triton import intercepting
from compressft_kernels.ops import linear
from torch._subclasses.fake_tensor import FakeTensorMode

KERNELS = Path(__file__).parents[2] / "kernels"
HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_cpu_takes_the_twin(operation):
    assert explain(operation) == f"{operation}: plain torch (there are no kernels for cpu)"
    assert not dispatch.runs_triton(operation, torch.zeros(1), torch.float32, **dispatch.DEFAULT_SIZES[operation])


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("entry", ["sm_80", "sm_89", "sm_90"])
def test_devices_that_are_elsewhere(operation, entry):
    said = explain(operation, device=entry, dtype=torch.bfloat16)
    assert said == f"{operation}: Triton kernel (settings of '{entry}': compiled for its kind, not measured)"
    assert "plain torch (float64 has no kernel)" in explain(operation, device=entry, dtype=torch.float64)


@pytest.mark.parametrize(
    ("capability", "entry"),
    [((8, 0), "sm_80"), ((8, 7), "sm_80"), ((8, 6), "sm_89"), ((8, 9), "sm_89"), ((9, 0), "sm_90"), ((10, 0), "sm_90"),
     ((12, 0), "sm_89")],
)  # fmt: skip
def test_settings_go_by_shared_memory(capability, entry):
    assert table_of(capability) == entry and entry in TABLE


@contextmanager
def tf32(allowed):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


SCALAR = "(exact float32 has no tensor cores: torch's libraries have it until a device shows that the kernel is faster)"


@pytest.mark.parametrize("entry", ["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize("operation", ["adapter", "prefix_attention"])
def test_exact_float32_is_left_to_torchs_libraries(entry, operation):
    x, sizes = torch.empty(2, 3, 5, 64, device="meta"), dispatch.DEFAULT_SIZES[operation]
    with tf32(False):
        assert explain(operation, device=entry) == f"{operation}: plain torch {SCALAR}"
        with pretending(entry):
            assert not dispatch.runs_triton(operation, x, torch.float32, **sizes)
            with dispatch.kernels_for_float32():  # as the benchmark does to compare them
                assert dispatch.runs_triton(operation, x, torch.float32, **sizes)
            assert not dispatch.runs_triton(operation, x, torch.float32, **sizes)
            assert dispatch.runs_triton(operation, x, torch.bfloat16, **sizes)
    with tf32(True), pretending(entry):
        assert dispatch.runs_triton(operation, x, torch.float32, **sizes)


def test_a_device_that_shows_the_kernel_to_be_faster_takes_it(monkeypatch):
    """Below so many rows, or at all: what the tuner writes for it."""
    x = torch.empty(10, 4, device="meta")
    for least, takes in ((0, False), (40, False), (41, True), (None, True)):
        monkeypatch.setitem(TABLE["sm_90"]["limits"], "library_rows_float32_prefix_attention", least)
        with tf32(False), pretending("sm_90"):
            q = x.view(2, 5, 4, 1)
            assert dispatch.runs_triton("prefix_attention", q, torch.float32, head_dim=1) is takes
        with tf32(False):
            below = f" below {least} rows" if least else ""
            path = "plain torch" if least == 0 else f"Triton kernel{below} (settings"
            assert explain("prefix_attention", device="sm_90").startswith(f"prefix_attention: {path}")


@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize("allowed", [True, False])
def test_the_gradient_of_a_masked_weight_in_exact_float32(scores, allowed):
    """By torch's libraries, with the right values; its kernel is for tensor cores."""
    launched = []
    x, dy, weight = torch.randn(6, 8), torch.randn(6, 5), torch.randn(5, 8)
    gate = torch.randn(5, 8) if scores else reference.pack_mask(torch.arange(40).view(5, 8) % 3 > 0)
    operands = (x, [False, True, scores], weight, gate, 0.25, [5, 8])
    with tf32(allowed), pretending("sm_90"), intercepting(lambda kernel, *_: launched.append(kernel.fn.__name__)):
        _, dweight, dscores = linear.backward(dy, *operands)
    assert launched == (["_gradient_kernel"] if allowed else [])
    if not allowed:
        kept = gate > 0.25 if scores else reference.unpack_mask(gate, 8)
        torch.testing.assert_close(dweight, dy.t() @ x * kept)
        if scores:
            torch.testing.assert_close(dscores, dy.t() @ x * weight)


def test_what_the_hardware_does_not_multiply():
    assert "7.5 does not multiply bf16 in hardware; use float16" in unsupported((7, 5), torch.bfloat16)
    assert "no tensor-core products for compute capability 7.5" in unsupported((7, 5), torch.float16)
    for capability in ((8, 0), (8, 9), (9, 0)):
        assert all(unsupported(capability, dtype) is None for dtype in (*HALVES, torch.float32))
        assert unsupported(capability, torch.float64) == "float64 has no kernel"


@pytest.mark.parametrize(
    ("operation", "sizes", "reason"),
    [
        ("adapter", {"r": 300}, "300 units"),
        ("prefix_attention", {"head_dim": 320}, "320 wide"),
        ("block_sparse_linear", {"tile": (32, 24)}, r"tiles are \(32, 24\)"),
        ("packed_linear", {"columns": 100, "nf4": True}, "100 columns of NF4"),
    ],
)
def test_sizes_that_no_kernel_takes(operation, sizes, reason):
    said = explain(operation, device="sm_90", dtype=torch.float16, **sizes)
    assert "plain torch" in said
    assert re.search(reason, said)


def test_explain_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="operation 'attention'; there are adapter, masked_linear"):
        explain("attention")
    with pytest.raises(ValueError, match="adapter does not depend on tile"):
        explain("adapter", tile=(16, 16))
    with pytest.raises(ValueError, match="no entry 'sm_70'; there are sm_90"), pretending("sm_70"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it says where no GPU is")
def test_explain_of_an_absent_gpu_names_what_can_be_asked():
    with pytest.raises(ValueError, match="torch sees no CUDA device; name one of sm_90, sm_80, sm_89"):
        explain("adapter", device="cuda")


def test_operands_without_dimensions_are_refused_by_their_checks():
    """Choosing a path looks at sizes before they are checked; the message is the check's all the same."""
    none, some = torch.zeros(()), torch.zeros(2, 2)
    for call in (
        lambda: masked_linear(none, some, some),
        lambda: packed_linear(none, some, None),
        lambda: adapter(some, none, None, some, None),
        lambda: prefix_attention(none, some, some, some, some),
        lambda: block_sparse_linear(some, none, some.bool()),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            call()


def test_fake_tensors_of_a_gpu_take_the_operators():
    """Shapes and devices of a model for a GPU can be worked out on a machine without one."""
    with FakeTensorMode():

        def fake(*shape):
            return torch.empty(shape, device="cuda", dtype=torch.bfloat16)

        q, k, p = fake(2, 4, 5, 64), fake(2, 2, 9, 64), fake(2, 3, 64)
        assert not dispatch.runs_triton("adapter", fake(4, 64), torch.float32, r=4)
        results = (
            masked_linear(fake(4, 64), fake(32, 64), fake(32, 64)),
            adapter(fake(4, 64), fake(16, 64), None, fake(64, 16), None),
            prefix_attention(q, k, k, p, p, causal=True),
            block_sparse_linear(fake(4, 48), fake(4, 16, 16), torch.empty(2, 3, dtype=torch.bool, device="cuda")),
        )
    assert [tuple(y.shape) for y in results] == [(4, 32), (4, 64), (2, 4, 5, 64), (4, 32)]
    assert all(y.device.type == "cuda" and y.dtype == torch.bfloat16 for y in results)


def test_the_first_row_that_holds_wins(monkeypatch):
    rows = [
        {"when": {"bytes": 4, "rows_max": 16}, "config": {"n": 1}},
        {"when": {"rows_max": 64}, "config": {"n": 2}},
        {"when": {}, "config": {"n": 3}},
    ]
    monkeypatch.setitem(TABLE, "here", {"k": rows, "limits": {"most": 5}})
    monkeypatch.setitem(
        TABLE, "more", {"other": [{"when": {}, "config": {"n": 4}}], "limits": {"most": 6, "least": None}}
    )
    for facts, want in (((4, 16), 1), ((2, 16), 2), ((4, 17), 2), ((4, 65), 3)):
        assert configuration("k", ["here", "more"], bytes=facts[0], rows=facts[1])["n"] == want
    assert configuration("other", ["here", "more"])["n"] == 4
    assert (limit("most", ["here", "more"]), limit("least", ["here", "more"]), limit("none", ["here"])) == (
        5,
        None,
        None,
    )
    with pytest.raises(LookupError, match="no configuration of absent in"):
        configuration("absent", ["here", "more"], rows=1)


@pytest.mark.parametrize("entry", TABLE)
def test_every_kernel_has_a_row_for_all_sizes(entry):
    """The last row of each holds without conditions, and no earlier one hides those behind it."""
    assert set(TABLE[entry]) == set(TABLE["sm_90"])
    for kernel, rows in TABLE[entry].items():
        if kernel != "limits":
            assert rows[-1]["when"] == {}, kernel
            assert all(row["when"] for row in rows[:-1]), kernel


@pytest.mark.dear
@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_read_from_the_new_setting_and_the_old_flag(new, allowed):
    """Each in a process of its own: once the new one was used, torch refuses to read the old one."""
    use = f"fp32_precision = {'tf32' if allowed else 'ieee'!r}" if new else f"allow_tf32 = {allowed}"
    code = (
        f"import torch; torch.backends.cuda.matmul.{use}\n"
        "from compressft_kernels import dispatch\n"
        f"assert dispatch.tf32_allowed() is {allowed}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(KERNELS)})
