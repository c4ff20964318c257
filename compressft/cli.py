"""The command line: typer commands without logic. Exit code 0 success, 2 a user's mistake, 1 a fault of ours."""

from __future__ import annotations

import json
import logging
import shlex
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from compressft.errors import Interrupted, UserError, VerificationError, trouble
from compressft.utils.collector import end_quickly, importing
from compressft.utils.phases import Clock, watched
from compressft.utils.version import __version__
from compressft.utils.visible import PlainConsole
from compressft.utils.waiting import sleep_while_waiting

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
out = PlainConsole()
err = PlainConsole(stderr=True)

Set = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a field of the recipe.")]
Output = Annotated[Path | None, typer.Option(help="Run directory (default: runs/RECIPE).")]


def _shipped(beginning: str) -> list[str]:
    from compressft.recipe.document import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(beginning)]


RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name or a YAML file.", autocompletion=_shipped)
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory.")]


def _version(asked: bool) -> None:
    if asked:
        out.print(f"compressft {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune a transformer while it is compressed, and ship a verified ONNX file."""


@app.command()
def run(
    recipe: RecipeName,
    output: Output = None,
    set: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Every step on a few rows: does it run at all?")] = False,
) -> None:
    """Train, compress, export, verify, measure and report."""
    from compressft.recipe.recipe import load_recipe
    from compressft.recipe.recipe import smoke as few_rows

    loaded = load_recipe(recipe, set or ())
    if smoke:
        loaded = few_rows(loaded)
    # After the recipe, which is refused before seconds of imports.
    with importing():
        from compressft.run.flow import run as run_recipe
        from compressft.run.report import terminal_table
        from compressft.utils.machine import process_age

    # What schedulers and containers send, before and after training too.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    folder = output or Path("runs") / loaded.name
    try:
        report = run_recipe(loaded, folder, resume, err, process_age())
    except (Interrupted, KeyboardInterrupt) as stop:
        options = "".join(f" --set {shlex.quote(s)}" for s in set or ()) + (" --smoke" if smoke else "")
        command = f"compressft run {shlex.quote(recipe)} --output {shlex.quote(str(folder))}{options} --resume"
        err.print(f"{str(stop) or 'stopped'}. Go on with: {command}", soft_wrap=True)
        raise typer.Exit(130) from None
    out.print(terminal_table(report))
    shipped = f"   ONNX: {folder / 'onnx' / 'model.onnx'}" if loaded.export.enabled else ""
    out.print(f"Report: {folder / 'report' / 'report.html'}{shipped}", soft_wrap=True)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    from compressft.recipe.document import read_document, shipped_recipes

    names = shipped_recipes()
    width = max(map(len, names))
    for name in names:
        out.print(f"{name:{width}}  {read_document(name)['description']}", soft_wrap=True)


@app.command()
def evaluate(
    source: Annotated[
        str, typer.Argument(metavar="DIR|model.onnx", help="Run directory, model/, onnx/ or model.onnx.")
    ],
    data: Annotated[Path, typer.Option(help="JSONL, CSV or Parquet file.")],
    batch: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Score a torch checkpoint or an ONNX file with the same metrics."""
    from compressft.run.evaluate import evaluate as score
    from compressft.utils.quiet import quiet_libraries

    quiet_libraries()
    result = score(source, data, batch)
    if as_json:
        print(json.dumps(result))
        return
    note = result.pop("note", None)
    for name, value in result.items():
        out.print(f"{name:12} {value:.4f}" if isinstance(value, float) else f"{name:12} {value}")
    if note:
        err.print(f"note: {note}", soft_wrap=True)


@app.command()
def export(run_dir: RunDir, set: Set = None) -> None:
    """Export, verify and measure a trained run again, with other export settings."""
    from compressft.run.again import export_again
    from compressft.run.report import terminal_table

    out.print(terminal_table(export_again(run_dir, set or (), err)))


@app.command()
def report(run_dir: RunDir) -> None:
    """Print a run's final table and write its report files again."""
    from compressft.run.again import report_again
    from compressft.run.report import terminal_table

    out.print(terminal_table(report_again(run_dir)))


@app.command()
def plan(
    recipe: RecipeName,
    memory: Annotated[str | None, typer.Option(help="Budget, such as 8GiB: says whether the run fits.")] = None,
    set: Set = None,
) -> None:
    """Predict peak memory and time before anything is run."""
    from compressft.recipe.recipe import load_recipe
    from compressft.run.plan.predict import plan as predict

    prediction = predict(load_recipe(recipe, set or ()), memory)
    for line in prediction.lines():
        out.print(line, soft_wrap=True)


benchmark = typer.Typer(help="Measure on this machine.", no_args_is_help=True)
app.add_typer(benchmark, name="benchmark")


def _writable(path: Path | None) -> Path | None:
    # Before measuring, which takes minutes.
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"--json {str(path)!r}: is no file in a folder that exists")
    return path


Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", callback=_writable, help="Also write the rows to a file.")
]


@benchmark.command()
def edge(
    models: Annotated[list[Path], typer.Argument(help="ONNX files or folders with a model.onnx.")],
    shape: Annotated[
        list[str] | None, typer.Option(help="BATCHxLENGTH, repeatable (default 1x32, 1x128, 8x128).")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads (default: OMP_NUM_THREADS, else all cores).")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 3,
    json_file: Json = None,
) -> None:
    """Latency of ONNX files, each in a process of its own, interleaved."""
    from compressft.run.benchmark import edge as measure_edge

    _rows(measure_edge(models, shape or ["1x32", "1x128", "8x128"], threads, rounds), json_file)


@benchmark.command()
def training(
    recipe: RecipeName,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps per stage.")] = 20,
    set: Set = None,
    json_file: Json = None,
) -> None:
    """Step time, tokens per second and peak memory of every stage of a recipe."""
    from compressft.recipe.recipe import load_recipe
    from compressft.run.benchmark import training as measure_training

    _rows(measure_training(load_recipe(recipe, set or ()), steps), json_file)


@benchmark.command()
def ops(
    device: Annotated[str | None, typer.Option(metavar="cpu|cuda", help="Default: the GPU if there is one.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="OP", help="An operator, repeatable (default: all).")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes, in seconds.")] = False,
    json_file: Json = None,
) -> None:
    """Correctness and speed of the kernels' operators, next to PyTorch's."""
    from compressft.run.benchmark import ops as measure_ops

    document, tables = measure_ops(device, only or (), quick, lambda line: err.print(line, soft_wrap=True))
    for operation, rows in tables.items():
        out.print(operation)
        _rows(rows, None)
    for operation, reason in document["wrong"].items():
        out.print(f"wrong: {operation}: {reason}", soft_wrap=True)
    if json_file is not None:
        json_file.write_text(json.dumps(document, indent=1), encoding="utf-8")
    if document["wrong"]:
        raise typer.Exit(1)


def _rows(rows: Sequence[Mapping[str, object]], json_file: Path | None) -> None:
    table = Table(*rows[0], box=None)
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    out.print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1), encoding="utf-8")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A run directory, its delta/, or a saved adapter.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A folder that does not exist yet.")],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="peft|adapterhub|compressft", help="Format. Default: ours for others' adapters, theirs for ours."
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base model, where SRC does not say it.")] = None,
) -> None:
    """Turn an adapter of PEFT's or AdapterHub's into ours, or ours into theirs."""
    from compressft.adapters.convert import convert as convert_folder
    from compressft.utils.quiet import quiet_libraries

    quiet_libraries()
    done = convert_folder(source, target, to, base)
    out.print(f"{done.source} -> {done.target}: {target}", soft_wrap=True)
    out.print(f"load it with {done.usage}", soft_wrap=True)


@app.command()
def analyse(
    models: Annotated[
        list[str], typer.Argument(metavar="RUN_DIR|MODEL...", help="Run directories, model folders or hub ids.")
    ],
    kind: Annotated[str, typer.Option("--type", help="Which analysis, such as closeness.")],
    set: Annotated[list[str] | None, typer.Option("--set", metavar="a=b", help="Set a field of the analysis.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Find something out about finished models; a run directory alone is compared with its base."""
    from compressft.run.analyse import analyse_models
    from compressft.run.report.terminal import analysis_table
    from compressft.utils.quiet import quiet_libraries

    quiet_libraries()
    analysis, finding = analyse_models(kind, models, set or ())
    found = finding.row(analysis)
    if as_json:
        print(json.dumps(found))
        return
    # A pipe says no width, and tensors have long names.
    out.print(analysis_table(found), width=None if out.is_terminal else 150)


@app.command()
def push(
    run_dir: RunDir,
    repo: Annotated[str, typer.Argument(metavar="HUB/ID", help="The repository; made where there is none.")],
    part: Annotated[
        str | None, typer.Option(metavar="onnx|model|delta", help="Which folder (default: onnx, where there is one).")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch (default: main).")] = None,
) -> None:
    """Upload a run's verified folder, with its model card, to the Hugging Face hub."""
    from compressft.run.push import Target
    from compressft.run.push import push as upload
    from compressft.utils.quiet import quiet_libraries

    quiet_libraries()
    out.print(upload(run_dir, Target(repo, private, revision), part), soft_wrap=True)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from compressft.recipe.schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=1))


@app.command()
def env() -> None:
    """Versions, device, and which kernels will be used and why."""
    from compressft.run.environment import lines

    for line in lines():
        out.print(line, soft_wrap=True)


def main() -> None:
    """Entry point: turns exceptions into one line and an exit code."""
    sleep_while_waiting()
    end_quickly()
    # Where peft is installed, transformers imports bitsandbytes, which recommends a hub package that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with watched(err, Clock()):
            app()
    except UserError as error:
        err.print(f"error: {error}", soft_wrap=True)
        sys.exit(2)
    except VerificationError as error:
        err.print(f"not verified: {error}", soft_wrap=True)
        sys.exit(1)
    except Exception as error:
        said = trouble(error)
        if said is None:
            raise
        err.print(f"error: {said}", soft_wrap=True)
        sys.exit(2)
