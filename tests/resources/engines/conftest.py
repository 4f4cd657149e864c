"""Fixtures shared by the tests of several engines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from resources.engines.transformers.sampler import TransformersSampler


@pytest.fixture(scope="module")
def embedded() -> Iterator[TransformersSampler]:
    """The embedded engine, with which the others are compared."""
    with TransformersSampler(threads=1, batch_size=64) as opened:
        yield opened
