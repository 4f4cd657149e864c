"""What tests of several engines share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from resources.engines.transformers.sampler import TransformersSampler


@pytest.fixture(scope="module")
def embedded() -> Iterator[TransformersSampler]:
    """The embedded engine, beside which others are measured."""
    with TransformersSampler(threads=1, batch_size=64) as opened:
        yield opened
