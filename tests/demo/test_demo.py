"""The demo: its parts on a short training, and as a whole."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qgraph.demo import DemoResult, run_demo
from qgraph.demo.model import DigitsNet
from qgraph.demo.training import accuracy, calibration_batches, load_digits, train

STAGES = ("0_captured", "1_fused", "2_prepared", "3_integer")
ROWS = [
    "float accuracy",
    "fake-quant accuracy",
    "integer accuracy",
    "SQNR of the logits, integer against float",
    "integers that differ from fake-quant, all sites",
    "largest difference",
    "lowest agreement of a site",
    "bytes of weights",
    "operators per format",
    "float islands",
]


class Short:
    """A demo of one epoch, with what it said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: list[str] = []
        self.result = run_demo(folder, say=self.said.append, progress=False, epochs=1)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Short]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Short(tmp_path_factory.mktemp("demo") / "new" / "folder")
    torch.set_num_threads(threads)


def test_the_table_has_every_row(short: Short) -> None:
    assert [name for name, _ in short.result.rows()] == ROWS
    for name, value in short.result.rows():
        assert f"{name}" in short.result.table()
        assert f" {value} " in short.result.table()
    rows = dict(short.result.rows())
    assert re.fullmatch(r"\d+\.\d\d%", rows["integer accuracy"])
    assert re.fullmatch(r"-?\d+\.\d dB", rows["SQNR of the logits, integer against float"])
    assert re.fullmatch(r"\d+ of \d+", rows["integers that differ from fake-quant, all sites"])
    assert rows["float islands"] == "none"
    assert rows["operators per format"] == "1 float32, 1 int32, 15 int8"


def test_the_steps_are_told_in_order(short: Short) -> None:
    words = ("train", "capture", "run the passes", "calibrate", "lower", "simulate")
    assert [line.startswith(word) for line, word in zip(short.said, words, strict=True)] == [True] * len(words)
    assert all(re.search(r"\(\d+\.\d s\)$", line) for line in short.said)


def test_every_stage_has_a_picture_and_a_text(short: Short) -> None:
    written = {path.name for path in short.folder.iterdir()}
    assert written == {f"{stage}.{kind}" for stage in STAGES for kind in ("svg", "txt")} | {"report.html", "report.txt"}
    for stage in STAGES:
        ElementTree.parse(short.folder / f"{stage}.svg")
        text = (short.folder / f"{stage}.txt").read_text(encoding="utf-8")
        assert text.startswith(f"graph DigitsNet ({stage.partition('_')[2]}")


def test_the_report_has_table_sites_and_operators(short: Short) -> None:
    text = (short.folder / "report.txt").read_text(encoding="utf-8")
    assert short.result.table() in text
    for site in short.result.sites:
        assert site.site in text
    page = (short.folder / "report.html").read_text(encoding="utf-8")
    linked = set(re.findall(r'(?:href|src)="([^"]+)"', page))
    assert linked == {f"{stage}.{kind}" for stage in STAGES for kind in ("svg", "txt")}
    assert all(name in page for name in ROWS)


def test_integers_are_what_fake_quantization_computes(short: Short) -> None:
    assert all(site.largest <= 1 for site in short.result.sites)
    assert all(site.agreement >= 0.999 for site in short.result.sites)
    assert 3 * short.result.integer_bytes < short.result.float_bytes


def same(first: DemoResult, second: DemoResult) -> bool:
    return first.rows() == second.rows() and first.sites == second.sites and first.ops == second.ops


def test_it_is_deterministic_whatever_the_seed_outside(short: Short, tmp_path: Path) -> None:
    torch.manual_seed(1234)
    again = Short(tmp_path)
    assert same(again.result, short.result)
    for stage in STAGES:
        assert (tmp_path / f"{stage}.txt").read_bytes() == (short.folder / f"{stage}.txt").read_bytes()
        assert (tmp_path / f"{stage}.svg").read_bytes() == (short.folder / f"{stage}.svg").read_bytes()


def test_without_graphviz_it_says_so_and_writes_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    demo = Short(tmp_path / "out")
    written = {path.name for path in demo.folder.iterdir()}
    assert written == {f"{stage}.{kind}" for stage in STAGES for kind in ("dot", "txt")} | {"report.html", "report.txt"}
    (message,) = [line for line in demo.said if "graphviz" in line]
    assert "which is not installed" in message
    assert "apt-get install graphviz" in message
    page = (demo.folder / "report.html").read_text(encoding="utf-8")
    assert 'href="0_captured.dot"' in page
    assert "<img" not in page


def test_the_model_has_the_structures_the_demo_is_about() -> None:
    kinds = [type(module).__name__ for module in DigitsNet().modules()]
    assert {"Conv2d", "BatchNorm2d", "MaxPool2d", "Linear", "Dropout"} <= set(kinds)
    depthwise = DigitsNet().depthwise
    assert depthwise.groups == depthwise.in_channels
    assert DigitsNet().eval()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_data_are_split_without_overlap() -> None:
    digits = load_digits()
    assert digits.train_images.shape == (1297, 1, 8, 8)
    assert digits.test_images.shape == (500, 1, 8, 8)
    assert 0 <= digits.train_images.min() <= digits.train_images.max() <= 1
    assert set(digits.test_labels.tolist()) == set(range(10))
    batches = calibration_batches(digits)
    assert [len(batch) for batch in batches] == [8] * 16


def test_accuracy_counts_right_answers() -> None:
    digits = load_digits()
    labels = iter(digits.test_labels.split(100))
    assert accuracy(lambda images: torch.eye(10)[next(labels)], digits) == 1.0
    assert accuracy(lambda images: torch.eye(10)[torch.zeros(len(images), dtype=torch.int64)], digits) < 0.2


def test_training_learns() -> None:
    digits = load_digits()
    model = train(digits, epochs=2, progress=False)
    assert not model.training
    assert accuracy(model, digits) > 0.5


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    result = run_demo(tmp_path, say=lambda line: None, progress=False)
    assert result.float_accuracy >= 0.97
    assert abs(result.integer_accuracy - result.float_accuracy) <= 0.005
    assert all(site.agreement >= 0.999 and site.largest <= 1 for site in result.sites)
    assert result.islands == ()
