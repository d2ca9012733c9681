"""The command line: output, exit codes, and messages in place of tracebacks."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn

import qgraph
import qgraph.pipeline.registry as registry_module
import qgraph.targets.find as find_module
from qgraph.cli import main
from qgraph.pipeline import REGISTRY
from qgraph.pipeline.registry import PassRegistry

ROOT = Path(__file__).parents[2]


class Run:
    """One command: exit code and what it wrote."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def command(*arguments: str, columns: int = 1000) -> Run:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "argv", ["qgraph", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        written = capsys.readouterr()
        return Run(int(ended.value.code or 0), written.out, written.err)

    return command


def test_help_names_every_command(run) -> None:
    for arguments in (["--help"], []):
        shown = run(*arguments).out
        for word in ("qgraph [OPTIONS] COMMAND", "demo", "passes", "targets", "--version"):
            assert word in shown
    assert run("--help").code == 0


def test_version(run) -> None:
    shown = run("--version")
    assert (shown.code, shown.out, shown.err) == (0, f"qgraph {qgraph.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dmeo"], ["No such command 'dmeo'", "demo"]),
        (["passes", "extra"], ["unexpected extra argument", "extra"]),
        (["targets", "--all"], ["No such option", "--all"]),
        (["demo", "--ouf", "x"], ["No such option", "--out"]),
        (["demo", "--out"], ["requires an argument"]),
        (["--verbose"], ["No such option"]),
    ],
)
def test_wrong_arguments(arguments: list[str], words: list[str], run) -> None:
    shown = run(*arguments)
    assert shown.code == 2
    assert shown.out == ""
    assert "Traceback" not in shown.err
    for word in words:
        assert word in shown.err


def test_passes_lists_every_pass_with_its_promises(run) -> None:
    shown = run("passes")
    assert (shown.code, shown.err) == (0, "")
    lines = {line.split()[0]: line for line in shown.out.splitlines()[2:]}
    assert list(lines) == REGISTRY.names()
    fusion = lines["fuse-conv-bn-add-relu"]
    assert "canonical" in fusion
    assert "fused" in fusion
    assert "within 0.0001" in fusion
    assert "exact" in lines["canonicalize"]
    assert all(line.endswith("qgraph") for line in lines.values())


@pytest.mark.parametrize("columns", [100, 140])
def test_passes_fits_the_terminal(columns: int, run) -> None:
    shown = run("passes", columns=columns).out
    limit = max(columns, 120)
    assert max(map(len, shown.splitlines())) <= limit
    assert len(shown.splitlines()) > len(REGISTRY.names()) + 2, "descriptions are wrapped"


def test_a_pass_that_cannot_be_loaded_hides_no_other(run, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("broken-pass", "no.such.module:Pass", "qgraph.passes")
    monkeypatch.setattr(registry_module, "entry_points", lambda group: [point])
    registry = PassRegistry({"canonicalize": "passes.canonicalize:Canonicalize"})
    monkeypatch.setattr("qgraph.cli.REGISTRY", registry)
    shown = run("passes")
    assert shown.code == 0
    assert "canonicalize" in shown.out
    assert "cannot be loaded: the pass 'broken-pass' cannot be imported" in shown.out


def test_targets_lists_every_target(run) -> None:
    shown = run("targets")
    assert (shown.code, shown.err) == (0, "")
    assert "bpu" in shown.out
    assert qgraph.get_target("bpu").description in shown.out
    assert str(len(qgraph.get_target("bpu").ops)) in shown.out


def test_a_target_that_cannot_be_loaded_hides_no_other(run, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("chip", "no.such.module:TARGET", "qgraph.targets")
    monkeypatch.setattr(find_module, "entry_points", lambda group: [point])
    shown = run("targets")
    assert shown.code == 0
    assert "bpu" in shown.out
    assert "cannot be loaded: the target 'chip' cannot be loaded from no.such.module:TARGET" in shown.out


def test_errors_of_the_user_are_messages(run, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("bpu", "mine:TARGET", "qgraph.targets")
    monkeypatch.setattr(find_module, "entry_points", lambda group: [point])
    shown = run("targets")
    assert shown.code == 2
    assert shown.out == ""
    assert shown.err.startswith("error: a target named 'bpu' exists already\n  why: ")
    assert "  what to do: give one of them another name" in shown.err


def test_notes_of_errors_are_shown(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[str]:
        error = qgraph.PassError("it failed")
        error.attach("the neighbourhood")
        raise error

    monkeypatch.setattr("qgraph.cli.list_targets", fail)
    assert run("targets").err == "error: it failed\nthe neighbourhood\n"


def test_faults_of_qgraph_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[str]:
        raise ZeroDivisionError

    monkeypatch.setattr("qgraph.cli.list_targets", fail)
    monkeypatch.setattr(sys, "argv", ["qgraph", "targets"])
    with pytest.raises(ZeroDivisionError):
        main()


def test_a_report_folder_that_is_a_file(run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "inner", Path("/proc/none")):
        shown = run("demo", "--out", str(folder), "--quiet")
        assert shown.code == 2
        assert shown.err.startswith(f"error: the report cannot be written to {folder}\n  why: ")
        assert "choose a folder you may write to" in shown.err
        assert shown.out == "", "it stops before training"


def test_without_scikit_learn_the_demo_says_what_to_install(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    shown = run("demo", "--out", str(tmp_path))
    assert shown.code == 2
    assert "scikit-learn, which is not installed" in shown.err
    assert "pip install 'qgraph-fx[demo]'" in shown.err


def test_python_m_qgraph(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qgraph", "--version"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"qgraph {qgraph.__version__}\n"), done.stderr


def test_target_files_are_linted(run, tmp_path: Path) -> None:
    path = tmp_path / "chip.toml"
    text = (ROOT / "qgraph/targets/bpu.toml").read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    clean = run("targets", "--lint", str(path))
    assert (clean.code, clean.out) == (0, f"{path}: 0 error(s), 0 warning(s)\n")
    path.write_text(text.replace('"int8*int8" = 1024\n', ""), encoding="utf-8")
    broken = run("targets", "--lint", str(path))
    assert broken.code == 1
    assert "no rate for int8*int8" in broken.out


def test_modules_are_imported_first(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first_of_all.py").write_text("print('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert run("--import", "first_of_all", "targets").out.startswith("imported\n")
    failed = run("--import", "nothing_here", "targets")
    assert failed.code == 2
    assert "the module 'nothing_here' cannot be imported" in failed.err


def test_plans(run, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()).eval()
    example = torch.zeros(2, 4)
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    qgraph.Plan.of(qgraph.prepare(model, example)).save(one)
    qgraph.Plan.of(qgraph.prepare(model, example, qgraph.get_qconfig(out_dtype="int16"))).save(two)
    shown = run("plan", "show", str(one))
    assert shown.code == 0
    assert "Sequential on bpu: 4 sites" in shown.out
    assert "0.weight" in shown.out
    same = run("plan", "diff", str(one), str(one))
    assert (same.code, same.out) == (0, "0 difference(s)\n")
    other = run("plan", "diff", str(one), str(two))
    assert other.code == 1
    assert "1: format int8 -> int16" in other.out
    for wrong in ("nothing.toml", "model.qgraph"):
        failed = run("plan", "show", str(tmp_path / wrong))
        assert failed.code == 2
        assert wrong in failed.err
