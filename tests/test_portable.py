"""The benchmark of other processors: what is compared, what a cell depends on, what a lack is, how it is shown."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.portable import elsewhere, files, machines, run
from benchmarks.portable.compare import by_row, compare
from benchmarks.portable.lack import Lack, done, installed
from benchmarks.portable.machines import Machine, Ready, processor
from benchmarks.portable.probe import WIDTH, write_probe
from benchmarks.portable.rows import Rows, sample
from benchmarks.portable.table import below, cell, render
from compressft.errors import UserError
from compressft.recipe.recipe import parse_recipe

SCORE = Path(machines.__file__).with_name("score.py")


def test_labels_are_counted_and_the_lead_of_those_that_differ_is_kept():
    torch = [np.array(row, np.float32) for row in ([3, 1, 0], [0, 2, 1.5], [0, 0, 1])]
    machine = [np.array(row, np.float32) for row in ([3, 1, 0], [0, 1.5, 2], [0, 0, 0.75])]
    found = compare(8, torch, machine)
    assert (found.batch, found.labels, found.distinct) == (8, 3, 3)
    assert found.agreement == pytest.approx(2 / 3)
    assert found.error == 0.5
    assert found.missed == (0.5,)
    assert found.closest == 0.5


def test_tokens_count_one_by_one_and_nan_agrees_with_nothing():
    torch = [np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)[:2]]
    machine = [row.copy() for row in torch]
    machine[1][0, 0] = np.nan
    found = compare(1, torch, machine)
    assert found.labels == 5
    assert found.agreement == pytest.approx(4 / 5)


def rows(**changes):
    fields = {
        "sha256": "ab" * 32,
        "bytes": 4_000_000,
        "kind": "sequence-classification",
        "split": "test",
        "lengths": (2, 3),
        "sizes": (1, 1, 8),
        "members": ((0,), (1,), (1, 0)),
        "batches": ({}, {}, {}),
        "torch": {"1": [[1.0, 0.0], [0.0, 1.0]], "8": [[1.0, 0.25], [0.0, 1.0]]},
    }
    return Rows(**{**fields, **changes})


def test_batches_come_back_as_rows_without_padding():
    logits = [[[[1.0]] * 2], [[[2.0]] * 3], [[[4.0]] * 3, [[3.0]] * 3]]
    assert [row.tolist() for row in by_row(rows(), logits, 1)] == [[[1.0]] * 2, [[2.0]] * 3]
    assert [row.tolist() for row in by_row(rows(), logits, 8)] == [[[3.0]] * 2, [[4.0]] * 3]


def test_the_sample_is_fixed_and_in_order():
    assert sample(range(5), 7) == [0, 1, 2, 3, 4]
    found = sample(range(1000), 200)
    assert found == sorted(set(found)) == sample(range(1000), 200)


def place(name="haswell", version="1.2", key="", options=(), command=()):
    machine = Machine(name, "shows", lambda folder: Ready((), version), dict(options), key)
    return run.Place(machine, Ready(tuple(command), version), Path("."))


def test_a_cell_depends_on_file_rows_machine_and_runtime():
    keys = [
        run.cell_key(rows(), place()),
        run.cell_key(rows(sha256="cd" * 32), place()),
        run.cell_key(rows(lengths=(2,)), place()),
        run.cell_key(rows(), place("nehalem")),
        run.cell_key(rows(), place(version="1.3")),
        run.cell_key(rows(), place("here", key="one processor")),
        run.cell_key(rows(), place("here", key="another")),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == run.cell_key(rows(), place())


ABOUT = {"onnxruntime": "1.2", "processor": [], "saturates": True}


def figures(agreement, missed=()):
    one = {"batch": 1, "labels": 200, "agreement": agreement, "error": 0.25, "distinct": 9, "missed": missed}
    return {"comparisons": [one, {**one, "batch": 8, "agreement": 1.0, "error": 0.5, "missed": ()}]}


def written(*results):
    document = {"versions": {"onnxruntime": "1.2"}, "hardware": {}}
    for name, one, rows_, made, about in results:
        file = next(file for file in files.FILES if file.name == name)
        run.write(document, 200, run.Result(file, rows_, one, run.cell_key(rows_, one), made, about))
    return document


def test_a_file_that_changed_loses_its_old_cells_and_no_others():
    old, new = rows(), rows(sha256="cd" * 32)
    document = written(
        ("demo", place(), old, figures(1.0), ABOUT),
        ("demo", place("nehalem"), old, figures(1.0), ABOUT),
        ("tiny", place(), rows(sha256="ef" * 32), figures(1.0), ABOUT),
        ("demo", place("nehalem"), new, figures(0.99, (0.01, 0.02)), ABOUT),
    )
    assert {(c["file"], c["machine"]) for c in document["cells"].values()} == {("demo", "nehalem"), ("tiny", "haswell")}
    assert list(document["files"]) == ["demo", "tiny"]
    assert list(document["machines"]) == ["haswell", "nehalem"]
    json.dumps(document)


def test_a_cell_below_the_limit_is_bold_and_named():
    document = written(
        ("demo", place(), rows(), figures(0.99, (0.01, 0.02)), ABOUT),
        ("demo", place("nehalem"), rows(), figures(1.0), {**ABOUT, "saturates": False}),
        ("tiny", place(), rows(sha256="cd" * 32), {"error": "it broke"}, {}),
    )
    document["machines"]["wasm"] = {"shows": "WebAssembly", "lacks": "node (Node.js)"}
    assert cell(figures(0.99)) == "**99.00 %**, 0.5"
    assert cell(figures(1.0)) == "100.00 %, 0.5"
    assert below(document) == [
        "demo on haswell, batches of 1: 2 of 200 labels differ; torch's lead over the runner-up there: 0.01, 0.02",
        "tiny on haswell: it broke",
    ]
    text = render(document)
    assert "| demo | 2 of 2 | 0.25 | **99.00 %**, 0.5 | 100.00 %, 0.5 |" in text
    assert "| tiny | 2 of 2 | 0.25 | fails |  |" in text
    assert "| wasm | WebAssembly | lacks node (Node.js) | |" in text
    assert "| haswell | shows | 1.2 | yes, saturating |" in text


def test_a_lack_is_one_line():
    with pytest.raises(Lack, match=r"^no-such-program \(package\)$"):
        installed("no-such-program", of="package")
    with pytest.raises(Lack, match=r"^the thing \(last line\)$"):
        done([sys.executable, "-c", "import sys; sys.exit('first\\nlast line')"], "the thing")
    with pytest.raises(Lack, match=r"^the thing \(no-such-program: No such file or directory\)$"):
        done(["no-such-program"], "the thing")


def test_a_machine_that_lacks_something_is_a_row(tmp_path, monkeypatch):
    def lacking(folder):
        raise Lack("a thing (its package)")

    one = Machine("haswell", "shows", lacking)
    options = SimpleNamespace(json=tmp_path / "results.json", rows=5)
    said = []
    console = SimpleNamespace(print=lambda text, **_: said.append(text))
    assert run.prepared([one], options, console) == []
    assert said == ["haswell lacks a thing (its package)"]
    document = json.loads(options.json.read_text())
    assert document["machines"]["haswell"] == {"shows": "shows", "lacks": "a thing (its package)"}


def test_processors_are_told_by_name_and_flags(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: A chip\nflags\t\t: fpu avx2 avx512f avx512_vnni\n\nmodel name\t: A chip\n")
    assert str(processor(cpuinfo)) == "A chip; avx2, avx512f, avx512_vnni"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--file", "dmeo"], "did you mean 'demo'"),
        (["--machine", "haswel"], "did you mean 'haswell'"),
        (["--run", "demo"], "wants NAME=FOLDER"),
        (["--run", "nothing=folder"], "no such file"),
        (["--run", "demo=there-is-none", "--file", "demo", "--machine", "here"], "no finished run"),
    ],
)
def test_mistakes_are_one_line(arguments, words, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        run.main([*arguments, "--json", str(tmp_path / "results.json")])
    assert "\n" not in str(caught.value)


def test_every_file_has_a_recipe_that_parses():
    cases = {case.name: case for case in files.CASES}
    for file in files.FILES:
        assert (file.recipe is None) == (file.name in cases), file.name
    for case in cases.values():
        parse_recipe(dict(case.recipe), case.name)


def test_the_script_answers_a_job_exactly(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])
    third = helper.make_tensor("third", TensorProto.FLOAT, [], [1 / 3])
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "third"], ["logits"]),
    ]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length"])
    graph = helper.make_graph(nodes, "thirds", [ids], [logits], [third])
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "model.onnx")
    command = (sys.executable, str(SCORE))
    here = run.Place(
        Machine("here", "shows", lambda folder: Ready((), ""), {"session.x64quantprecision": "1"}),
        Ready(command, ""),
        tmp_path,
    )
    batches = [{"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}, {"input_ids": [[7]]}]
    answer = run.answered(tmp_path / "model.onnx", batches, here)
    third = np.float32(1 / 3)
    assert answer["logits"] == [[[float(np.float32(1) * third), float(np.float32(2) * third)]], [[float(7 * third)]]]
    assert answer["saturates"] is False
    with pytest.raises(RuntimeError, match="x"):
        run.answered(tmp_path / "none.onnx", batches, here)


def test_the_probe_needs_no_more_than_its_width(tmp_path):
    import onnx

    model = onnx.load(str(write_probe(tmp_path / "probe.onnx")))
    assert model.graph.input[0].type.tensor_type.shape.dim[1].dim_value == WIDTH
    # One pair of the largest products is beyond 16 bits.
    assert 2 * 255 * 127 > 2**15 - 1


def test_the_script_imports_nothing_that_an_emulated_machine_lacks():
    code = f"import sys; sys.path.insert(0, {str(SCORE.parent)!r}); import score; print('torch' in sys.modules)"
    done_ = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done_.stdout.strip() == "False", done_.stderr


def test_other_packages_are_compared_where_they_see_the_same_tokens():
    question = elsewhere.Asked(("a", "b"), ([1, 2], [1, 2, 3]), ([1.0, 0.0], [0.0, 1.0]), 3)
    answer = {"versions": "x 1", "ids": [[1, 2], [1, 2, 4]], "logits": [[0.75, 0.0], [0.0, 9.0]]}
    assert elsewhere.outcome(answer, question) == (
        "opens (x 1); 1 of 2 texts become the same tokens (1 that is cut does not), 2 of 2 labels are torch's, "
        "largest logit difference 0.25"
    )


def test_a_package_that_fails_says_so_without_our_paths(tmp_path):
    complain = f"import sys; sys.exit('FileError: no {tmp_path}/onnx/model')"
    with pytest.raises(RuntimeError, match=r"^FileError: no onnx/model$"):
        elsewhere.answered([sys.executable, "-c", complain], tmp_path / "onnx", elsewhere.Asked((), (), (), 3))
