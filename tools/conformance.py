"""Generated cases of a target, on every kernel set and on the engine the target stands for.

    python -m tools.conformance bpu --cases 10000 --seed 0

Ends with the summary and exit code 0 if no element differs; else shrinks the first failures, prints reproducers and
ends with 1.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tqdm import tqdm

from qgraph.errors import UserError
from qgraph.targets import get_target
from tests.conformance.build import Case
from tests.conformance.compare import ENGINES, Mismatch, engine_of, kernel_sets
from tests.conformance.session import Session, Summary
from tests.conformance.shrink import reproducer, shrink


def main(arguments: list[str] | None = None) -> int:
    """Runs the cases; 0 if nothing differs, 1 if something does, 2 if nothing could be compared."""
    options = _parser().parse_args(arguments)
    try:
        session = _session(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    summary = _run(session, options)
    print(summary)
    for case, mismatch in _distinct(summary)[: options.show]:
        print(f"\n{mismatch}\n{case.program.source()}\nshrinking ...\n")
        print(reproducer(shrink(case, session.compare, tries=options.tries)))
    if summary.failures:
        return 1
    return 0 if summary.cases else 2


def _distinct(summary: Summary) -> list[tuple[Case, Mismatch]]:
    """The first failure of each kind: who differs, and in which call."""
    first: dict[tuple[str, ...], tuple[Case, Mismatch]] = {}
    for case, mismatch in summary.failures:
        what = mismatch.what if mismatch.what.startswith("outcome") else ""
        steps = [step.op for step in case.program.steps if step.name == mismatch.site]
        kind = (mismatch.who, *steps, mismatch.site.rstrip("0123456789"), what.split("got")[0])
        first.setdefault(kind, (case, mismatch))
    return list(first.values())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.conformance", description=__doc__.partition("\n")[0])
    parser.add_argument("target", help="name or file of a target")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kernels", nargs="*", help="kernel sets to compare with the reference; default: all")
    parser.add_argument("--no-engine", action="store_true", help="compare kernel sets only")
    parser.add_argument("--large", action="store_true", help="sizes a plain-integer oracle cannot follow")
    parser.add_argument("--operators", nargs="*", help="draw from these calls only")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first failure")
    parser.add_argument("--show", type=int, default=1, help="failures to shrink and print")
    parser.add_argument("--tries", type=int, default=600, help="changes tried when a failure is shrunk")
    return parser


def _engine(target: str) -> Any:
    try:
        return engine_of(target)
    except ModuleNotFoundError as error:
        raise UserError(
            f"there is no engine to compare {target} with",
            why=str(error),
            fix=f"give --no-engine; engines are known for {', '.join(ENGINES)}",
        ) from error


def _session(options: argparse.Namespace) -> Session:
    get_target(options.target)  # refuses a name that is none
    slow_engine = options.large and options.target == "bpu"
    engine = None if options.no_engine or slow_engine else _engine(options.target)
    reason = None if engine is None else engine.available()
    if reason is not None:
        raise UserError(f"the engine of {options.target} is not available: {reason}", fix="give --no-engine")
    if engine is None and not kernel_sets(options.kernels):
        raise UserError(
            "there is nothing to compare the reference kernels with", fix="leave --no-engine or --large out"
        )
    return Session(
        options.target, engine, options.kernels, options.seed, large=options.large, operators=options.operators
    )


def _run(session: Session, options: argparse.Namespace) -> Summary:
    with tqdm(total=options.cases, unit="case", disable=None) as bar:

        def show(summary: Summary) -> None:
            bar.update(summary.cases - bar.n)
            bar.set_postfix(mismatches=len(summary.failures), refresh=False)

        return session.run(options.cases, stop=not options.keep_going, progress=show)


if __name__ == "__main__":
    sys.exit(main())
