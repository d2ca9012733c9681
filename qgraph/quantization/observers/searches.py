"""The searches by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

from qgraph.quantization.observers.kl import KLSearch
from qgraph.quantization.observers.search import (
    ClipStdSearch,
    MaxSearch,
    MixSearch,
    MSESearch,
    PercentileSearch,
    Search,
)
from qgraph.quantization.observers.spec import ObserverSpec

SEARCHES: dict[str, Callable[..., Search]] = {
    kind.name: kind for kind in (MaxSearch, PercentileSearch, MSESearch, KLSearch, MixSearch, ClipStdSearch)
}


def search_of(text: str | ObserverSpec) -> Search:
    """A search from its text, such as `percentile(percentile=99.9)`.

    Raises:
        QuantizationError: there is no such search or option, or a value is not accepted.
    """
    spec = ObserverSpec.parse(text) if isinstance(text, str) else text
    return spec.make(SEARCHES, "search")


def text_of(search: Search) -> str:
    """The text `search_of` takes."""
    return str(ObserverSpec(search.name, tuple((each.name, getattr(search, each.name)) for each in fields(search))))
