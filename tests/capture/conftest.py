"""Fixtures of the capture tests."""

from __future__ import annotations

import pytest
from torch.multiprocessing.reductions import StorageWeakRef


@pytest.fixture(autouse=True)
def _no_copied_weak_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying a `StorageWeakRef` frees its memory twice: an error here, instead of a crash somewhere later.

    `copy.deepcopy` of a tensor copies its attributes; a recorder among them brings its weak references along.
    """

    def refuse(self: StorageWeakRef, memo: dict[int, object] | None = None) -> StorageWeakRef:
        raise AssertionError("a StorageWeakRef is copied: its memory would be freed twice")

    monkeypatch.setattr(StorageWeakRef, "__deepcopy__", refuse, raising=False)
    monkeypatch.setattr(StorageWeakRef, "__copy__", refuse, raising=False)
