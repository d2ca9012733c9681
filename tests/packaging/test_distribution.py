"""What users install: metadata, the wheel, types for their own code, and a `passes` package of theirs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

import qgraph
from tests.packaging.sources import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def python(script: str, folder: Path, *options: str, path: str = str(ROOT)) -> subprocess.CompletedProcess[str]:
    """Runs a script in a folder, with qgraph behind the folder on the import path."""
    (folder / "user_script.py").write_text(textwrap.dedent(script), encoding="utf-8")
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": path, "HOME": str(folder)}
    command = [sys.executable, *options, "user_script.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_versions_agree() -> None:
    assert qgraph.__version__ == PROJECT["project"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", qgraph.__version__)


def test_names_of_the_distribution() -> None:
    assert PROJECT["project"]["name"] == "qgraph-fx"
    assert PROJECT["project"]["scripts"] == {"qgraph": "qgraph.cli:main"}
    assert PROJECT["tool"]["setuptools"]["packages"]["find"]["include"] == ["qgraph*", "passes*"]


def test_every_import_is_declared() -> None:
    """What the product imports is the standard library, itself, a dependency, or an extra."""
    from tests.packaging.sources import FILES, imports

    declared = {re.split(r"[>=<;\[ ]", entry)[0] for entry in PROJECT["project"]["dependencies"]}
    third = {module.split(".")[0] for path in FILES for module, _ in imports(path)} - set(sys.stdlib_module_names)
    # torch hands over arrays by numpy without declaring it
    extras = {"demo": ("scikit-learn", "sklearn"), "fast": ("numba", "numba"), "onnx": ("onnx", "onnx")}
    optional = {module for _, module in extras.values()}
    assert third - {"qgraph", "passes", "numpy"} - optional == declared - {"numpy"}
    for extra, (package, module) in extras.items():
        if module in third:
            assert any(package in entry for entry in PROJECT["project"]["optional-dependencies"][extra])


def test_constraints_name_the_torch_of_development() -> None:
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


def test_the_readme_shows_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([^)#:]+)\)", text)) - {"docs/benchmarks.md"}  # written by tools.bench
    assert linked
    assert all((ROOT / target).exists() for target in linked), linked
    for command in ("make demo", "make test"):
        assert command in text


def test_make_has_the_targets_the_readme_and_the_checks_use() -> None:
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"install", "demo", "test", "lint", "bench"} <= rules
    used = re.findall(r"^make ([a-z-]+)$", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(used) <= rules


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the sources, built with the tools that are installed."""
    pytest.importorskip("setuptools")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("qgraph", "passes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "tests").mkdir()
    (source / "tests/__init__.py").touch()
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", *options, str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_has_both_packages_types_and_targets(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"qgraph/py.typed", "passes/py.typed", "qgraph/targets/bpu.toml", "qgraph/__main__.py"} <= names
    for path in [*(ROOT / "qgraph").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]:
        assert path.relative_to(ROOT).as_posix() in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"qgraph", "passes", f"qgraph_fx-{qgraph.__version__}.dist-info"}


def test_the_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = """
        import sys
        from pathlib import Path
        import passes, qgraph, qgraph.passes
        home = Path(sys.argv[0]).resolve().parent / "site"
        assert Path(qgraph.__file__).parents[1] == Path(passes.__file__).parents[1] == home
        assert qgraph.get_target("bpu").ops
        print(qgraph.Pipeline.parse("canonicalize,fuse-conv-bn-add-relu"))
    """
    done = python(script, tmp_path, "-W", "error", path=str(site))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "canonicalize,fuse-conv-bn-add-relu\n"


USE = """
    import torch
    from torch import nn
    import qgraph
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    example = torch.randn(1, 3, 8, 8)
    qat = qgraph.prepare(model, example)
    print("prepared")
"""


def own_passes(folder: Path) -> Path:
    (folder / "passes").mkdir()
    (folder / "passes/__init__.py").write_text("MINE = True\n", encoding="utf-8")
    return folder / "passes"


def test_a_passes_package_beside_the_users_script_is_named(tmp_path: Path) -> None:
    """The script's folder comes first on sys.path: the usual way in which the packages meet."""
    mine = own_passes(tmp_path)
    done = python(USE, tmp_path)
    assert done.returncode == 1
    assert "a package of your own named 'passes' hides the one that belongs to qgraph" in done.stderr
    assert f"where: {mine}" in done.stderr
    assert "what to do: rename your package, or run from a folder that does not contain it" in done.stderr


def test_a_passes_module_or_plain_folder_of_the_user(tmp_path: Path) -> None:
    """A module `passes.py` hides it too; a folder without `__init__.py` does not."""
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes/notes.txt").touch()
    assert python(USE, tmp_path).stdout == "prepared\n"
    (tmp_path / "passes.py").write_text("MINE = True\n", encoding="utf-8")
    done = python(USE, tmp_path)
    assert done.returncode == 1
    assert "hides the one that belongs to qgraph" in done.stderr
    assert "passes.py" in done.stderr


def test_a_passes_package_imported_before_is_named(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    own_passes(tmp_path / "lib")
    before = """
        import sys
        sys.path.insert(0, "lib")
        import passes
        sys.path.remove("lib")
    """
    done = python(textwrap.dedent(before) + textwrap.dedent(USE), tmp_path)
    assert done.returncode == 1
    assert "hides the one that belongs to qgraph" in done.stderr


def test_parts_that_need_no_pass_work_beside_a_passes_package(tmp_path: Path) -> None:
    own_passes(tmp_path)
    script = """
        import torch
        import qgraph
        gm = qgraph.trace(torch.nn.Linear(2, 2).eval(), torch.randn(1, 2))
        qgraph.draw(gm, "g.dot")
        print("traced")
    """
    assert python(script, tmp_path).stdout == "traced\n"


USER_CODE = """
    from typing_extensions import reveal_type

    import torch
    from torch import nn

    import qgraph
    from qgraph.passes import Canonicalize, FuseConvBnAddRelu, find_shared_modules

    model = nn.Sequential(nn.Linear(3, 3)).eval()
    example = torch.randn(1, 3)
    reveal_type(qgraph.trace(model, example))
    qat = qgraph.prepare(model, example, target="bpu")
    reveal_type(qat)
    qgraph.calibrate(qat, [example])
    qgraph.set_fake_quantize(qat, qgraph.FakeQuantState.VALIDATION)
    integer = qgraph.convert(qat)
    reveal_type(integer)
    reveal_type(qgraph.Simulator(integer))
    pipeline = qgraph.Pipeline((Canonicalize(), FuseConvBnAddRelu()))
    reveal_type(FuseConvBnAddRelu())
    reveal_type(pipeline.run(integer).gm)
    reveal_type(find_shared_modules(integer)[0].path)
    reveal_type(qgraph.draw(integer, "g.dot"))
    reveal_type(qgraph.get_target("bpu").rule("add"))
    reveal_type(qgraph.qint8)
"""
REVEALED = [
    "torch.fx.graph_module.GraphModule",
    "torch.fx.graph_module.GraphModule",
    "torch.fx.graph_module.GraphModule",
    "qgraph.simulator.simulator.Simulator",
    "passes.fuse_conv_bn_add_relu.FuseConvBnAddRelu",
    "torch.fx.graph_module.GraphModule",
    "str",
    "pathlib.Path",
    "qgraph.targets.target.OpRule | None",
    "qgraph.numerics.formats.QType",
]


def check_types(folder: Path, script: str) -> str:
    """What mypy says of a user's script in strict mode."""
    pytest.importorskip("mypy")
    (folder / "user.py").write_text(textwrap.dedent(script), encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(folder / "cache"), "user.py"]
    environment = {"PATH": "/usr/bin:/bin", "MYPYPATH": str(ROOT), "HOME": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return "\n".join(line for line in done.stdout.splitlines() if line.startswith("user.py"))


@pytest.mark.slow
def test_user_code_is_typed_in_strict_mode(tmp_path: Path) -> None:
    said = check_types(tmp_path, USER_CODE)
    assert "error:" not in said
    revealed = re.findall(r'type is "(?:builtins\.)?(.*)"', said)
    assert [re.sub(r"Union\[(.*), None\]", r"\1 | None", found) for found in revealed] == REVEALED


@pytest.mark.slow
def test_user_code_that_is_wrong_is_found(tmp_path: Path) -> None:
    script = """
        import qgraph
        from qgraph.passes import FuseConvBnAddRelu, NoSuchPass
        FuseConvBnAddRelu(no_such_option=1)
        qgraph.draw("text", 3)
    """
    said = check_types(tmp_path, script)
    for words in ("NoSuchPass", 'Unexpected keyword argument "no_such_option"', 'incompatible type "str"'):
        assert words in said
