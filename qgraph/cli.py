"""The command line: `qgraph demo | passes | targets | simulate | conformance | plan`."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from tabulate import tabulate

import qgraph
from qgraph.errors import QGraphError, UserError
from qgraph.pipeline import REGISTRY
from qgraph.targets import Severity, get_target, lint_target, list_targets

app = typer.Typer(
    help="Float PyTorch models to bit-exact integer graphs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


conformance = typer.Typer(help="Compare with an integer graph, tensor by tensor.", no_args_is_help=True)
app.add_typer(conformance, name="conformance")
plan = typer.Typer(help="What was decided for every site of a prepared graph.", no_args_is_help=True)
app.add_typer(plan, name="plan")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qgraph {qgraph.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    modules: Annotated[
        list[str] | None,
        typer.Option("--import", metavar="module", help="Import a module first, such as one that defines operators."),
    ] = None,
) -> None:
    for name in modules or ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"the module {name!r} cannot be imported",
                why=f"{type(error).__name__}: {error}",
                fix="give a dotted module name; it is looked up in what is installed and in PYTHONPATH",
            ) from error


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("qgraph_demo"),
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Train a small network on handwritten digits and take it to integers, with a report of every stage."""
    from qgraph.demo import run_demo

    result = run_demo(out, say=typer.echo, progress=not quiet)
    typer.echo(result.table())
    typer.echo(f"report: {(out / 'report.html').resolve()}")


@app.command()
def passes() -> None:
    """List the passes, with what they need, establish and promise."""
    rows = []
    for name in REGISTRY.names():
        owner = REGISTRY.owner(name)
        try:
            cls = REGISTRY.get(name)
        except QGraphError as error:
            rows.append((name, f"cannot be loaded: {error.what}", "-", "-", "-", owner))
            continue
        first_line = (cls.__doc__ or "").strip().splitlines()[0]
        needs, ensures = (", ".join(sorted(words)) or "-" for words in (cls.requires, cls.ensures))
        rows.append((name, first_line, needs, ensures, str(cls.keeps), owner))
    typer.echo(_table(rows, ("pass", "what it does", "needs", "establishes", "outputs stay", "from")))


@app.command()
def targets(
    lint: Annotated[str | None, typer.Option(help="Look for contradictions in a target or its file instead.")] = None,
) -> None:
    """List the targets, or check one, by name or TOML file: exit code 1 if it contradicts itself."""
    if lint is not None:
        _lint(lint)
        return
    rows = []
    for name in list_targets():
        try:
            target = get_target(name)
            rows.append((name, target.description, str(len(target.ops))))
        except QGraphError as error:
            rows.append((name, f"cannot be loaded: {error.what}", "-"))
    typer.echo(_table(rows, ("target", "description", "operators")))


def _lint(target: str) -> None:
    findings = lint_target(target)
    for finding in findings:
        typer.echo(str(finding))
    errors = sum(finding.severity is Severity.ERROR for finding in findings)
    typer.echo(f"{target}: {errors} error(s), {len(findings) - errors} warning(s)")
    if errors:
        raise typer.Exit(1)


@app.command()
def simulate(
    model: Annotated[Path, typer.Argument(help="A saved integer graph.")],
    kernels: Annotated[str, typer.Option(help="Kernel set.")] = "reference",
) -> None:
    """Run a saved graph on its own example inputs, with one row per operator."""
    integer = qgraph.load(model)
    example = qgraph.graph_info(integer).example
    if example is None:
        raise UserError(f"{model} holds no example inputs", fix="save the graph with example=True")
    simulator = qgraph.Simulator(integer, kernels)
    typer.echo(simulator.run(*example.args, record=True, **example.kwargs).report())


@conformance.command()
def pack(
    model: Annotated[Path, typer.Argument(help="A saved integer graph.")],
    out: Annotated[Path, typer.Argument(help="The pack to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the random inputs.")] = 0,
) -> None:
    """Write a graph, inputs that look for differences, every tensor on the way and the outputs into one file."""
    from qgraph.artifact import pack

    names = pack(qgraph.load(model), out, seed=seed)
    typer.echo(f"{out}: {len(names)} cases: {', '.join(names)}")


@conformance.command()
def run(
    pack: Annotated[Path, typer.Argument(help="A conformance pack.")],
    kernels: Annotated[str, typer.Option(help="Kernel set.")] = "reference",
) -> None:
    """Simulate a pack and compare every tensor; the exit code is 1 if one differs."""
    from qgraph.artifact import run

    report = run(pack, kernels=kernels)
    typer.echo(report.table())
    if report.first is not None:
        raise typer.Exit(1)


@plan.command()
def show(file: Annotated[Path, typer.Argument(help="A plan, as Plan.save writes it.")]) -> None:
    """Show a plan, one row per site."""
    loaded = _plan(file)
    typer.echo(f"{loaded.model} on {loaded.target}: {len(loaded)} sites")
    typer.echo(str(loaded))


@plan.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A plan.")],
    second: Annotated[Path, typer.Argument(help="Another plan.")],
) -> None:
    """Show what two plans decide differently; the exit code is 1 if anything."""
    changes = _plan(first).diff(_plan(second))
    for change in changes:
        typer.echo(str(change))
    typer.echo(f"{len(changes)} difference(s)")
    if changes:
        raise typer.Exit(1)


def _plan(file: Path) -> qgraph.Plan:
    if file.suffix == ".qgraph":
        raise UserError(
            f"{file} is an integer graph",
            why="its formats are final, and it keeps no plan",
            fix="save the plan of the prepared graph: qgraph.Plan.of(prepared).save('plan.toml')",
        )
    return qgraph.Plan.load(file)


def _table(rows: Sequence[tuple[str, ...]], headers: tuple[str, ...]) -> str:
    """A table as wide as the terminal: the second column is wrapped to make room for the others."""
    gap = 2
    widths = [max(len(row[i]) for row in (headers, *rows)) + gap for i in range(len(headers))]
    room = shutil.get_terminal_size((200, 24)).columns - sum(widths) + widths[1] - gap
    limits = [None if i != 1 else max(room, 24) for i in range(len(headers))]
    return tabulate(rows, headers=headers, maxcolwidths=limits, disable_numparse=True)


def main() -> None:
    """Entry point: errors of the user are messages, not tracebacks."""
    try:
        app(prog_name="qgraph")
    except QGraphError as error:
        typer.echo(f"error: {error}", err=True)
        for note in getattr(error, "__notes__", []):
            typer.echo(note, err=True)
        sys.exit(2)
