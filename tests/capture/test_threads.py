"""Other threads use modules, draw numbers and capture meanwhile."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch
from torch import nn

from qgraph.capture import trace
from tests.capture.checks import called_modules, network, sites, x
from tests.support.models import Forward


def test_other_threads_may_use_modules_meanwhile() -> None:
    stop, failures, other = threading.Event(), [], network()
    given = x()
    expected = other(given)

    def work() -> None:
        while not stop.is_set():
            if not torch.equal(other(given), expected):
                failures.append("other result")
            other.note = torch.ones(1)
            time.sleep(0)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        names = {tuple(sites(trace(network(), x()))) for _ in range(5)}
    finally:
        stop.set()
        worker.join()
    assert names == {("0", "1", "2")}
    assert not failures


def test_other_threads_may_draw_random_numbers_meanwhile() -> None:
    running, drawn = threading.Event(), threading.Event()

    def forward(m, x):
        running.set()
        drawn.wait(5)
        return m.linear(x)

    def draw() -> None:
        running.wait(5)
        torch.rand(3)
        drawn.set()

    worker = threading.Thread(target=draw)
    worker.start()
    try:
        trace(Forward(forward, linear=nn.Linear(6, 6)).eval(), torch.ones(2, 4, 6), verify=False)
    finally:
        worker.join()


def test_two_captures_at_once() -> None:
    original = nn.Module.__call__
    first_runs, second_runs, first_is_done = threading.Event(), threading.Event(), threading.Event()
    results: dict[str, Any] = {}

    def first(m, x):
        first_runs.set()
        second_runs.wait(5)
        return m.net(x)

    def second(m, x):
        second_runs.set()
        first_is_done.wait(5)
        return m.net(x)

    models = {
        name: Forward(function, net=network()).eval() for name, function in (("first", first), ("second", second))
    }
    example = x()

    def capture(name: str) -> None:
        try:
            results[name] = called_modules(trace(models[name], example, verify=False))
        except Exception as error:  # noqa: BLE001 - reported below
            results[name] = error
        if name == "first":
            first_is_done.set()

    one = threading.Thread(target=capture, args=("first",))
    two = threading.Thread(target=capture, args=("second",))
    try:
        one.start()
        first_runs.wait(5)
        two.start()
        one.join()
        two.join()
        left = nn.Module.__call__
    finally:
        nn.Module.__call__ = original
    assert results == {name: ["net.0", "net.1", "net.2"] for name in ("first", "second")}
    assert left is original
