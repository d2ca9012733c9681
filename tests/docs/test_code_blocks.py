"""Every Python block of the documentation runs, in order, in one namespace per page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "docs/accuracy.md",
    "docs/capture.md",
    "docs/artifacts.md",
    "docs/configuration.md",
    "docs/exporting_onnx.md",
    "docs/observers.md",
    "docs/writing_a_pass.md",
    "docs/adding_an_operator.md",
    "docs/writing_a_target.md",
]
DEFINES_GLOBALLY = {"docs/adding_an_operator.md"}  # extends tables of the process: run in one of its own
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[int, str]]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [(text[: match.start(1)].count("\n"), match[1]) for match in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = blocks(page)
    assert found, f"{page} has no Python block"
    if page in DEFINES_GLOBALLY:
        script = tmp_path / "page.py"
        script.write_text("\n".join(code for _, code in found), encoding="utf-8")
        subprocess.run(
            [sys.executable, "-W", "error", str(script)], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        return
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, code in found:
        # Padding keeps line numbers of the page in tracebacks, and in source lines of captured graphs.
        exec(compile("\n" * line + code, str(ROOT / page), "exec"), namespace)


def test_the_pass_of_the_page_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (_, code), *_ = blocks("docs/writing_a_pass.md")
    exec(compile(code, "writing_a_pass.py", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert printed.count("mul(") == 1, "x * 1.0 is gone, x * -1 is left"
    assert "unit-scale not applied at" in printed
    assert "negation" in printed


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
