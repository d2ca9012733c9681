"""The command line: `qgraph demo | passes | targets`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from tabulate import tabulate

from qgraph.errors import QGraphError
from qgraph.pipeline import REGISTRY
from qgraph.targets import get_target, list_targets

app = typer.Typer(
    help="Float PyTorch models to bit-exact integer graphs.", no_args_is_help=True, pretty_exceptions_enable=False
)


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
        cls = REGISTRY.get(name)
        first_line = (cls.__doc__ or "").strip().splitlines()[0]
        needs = ", ".join(sorted(cls.requires)) or "-"
        rows.append((name, first_line, needs, str(cls.keeps), REGISTRY.owner(name)))
    typer.echo(tabulate(rows, headers=("pass", "what it does", "needs", "outputs", "from")))


@app.command()
def targets() -> None:
    """List the targets."""
    found = [get_target(name) for name in list_targets()]
    typer.echo(tabulate([(t.name, t.description, len(t.ops)) for t in found], headers=("target", "description", "ops")))


def main() -> None:
    """Entry point: errors of the user are messages, not tracebacks."""
    try:
        app()
    except QGraphError as error:
        typer.echo(f"error: {error}", err=True)
        for note in getattr(error, "__notes__", []):
            typer.echo(note, err=True)
        sys.exit(2)
