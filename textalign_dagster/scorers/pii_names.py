"""Names of persons and organisations, as recognised by a spaCy pipeline (extra `names`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from textalign_dagster.scorers.file_stamps import tree_hash
from textalign_dagster.settings import SettingsError

if TYPE_CHECKING:
    from spacy.language import Language

LABELS = frozenset({"PERSON", "PER", "ORG"})
"""Entity labels that count, as in the published scorer."""

REMEDY = (
    "give the name of an installed pipeline (pip install -e '.[names]'; python -m spacy download en_core_web_sm), "
    "or a folder saved by spaCy"
)


def names_in(pipeline: str, texts: Sequence[str]) -> Iterator[list[tuple[int, int]]]:
    """The (start, end) of the names in each text, in order.

    Raises:
        SettingsError: there is no such pipeline, or it recognises no entities.
    """
    nlp = load_pipeline(pipeline)
    nlp.max_length = max([nlp.max_length, *map(len, texts)])  # spaCy refuses longer texts
    for document in nlp.pipe(texts):
        yield [(entity.start_char, entity.end_char) for entity in document.ents if entity.label_ in LABELS]


def pipeline_version(pipeline: str) -> str:
    """What determines the names: spaCy's release, and the pipeline's content or release. Never raises."""
    found = tree_hash(Path(pipeline)) if Path(pipeline).is_absolute() else _release(pipeline)
    return f"spacy{_release('spacy')}+{Path(pipeline).name}:{found}"


def load_pipeline(pipeline: str) -> Language:
    """A pipeline that recognises entities.

    Raises:
        SettingsError: as in :func:`names_in`.
    """
    return _loaded(pipeline, pipeline_version(pipeline))


@lru_cache(maxsize=2)
def _loaded(pipeline: str, _version: str) -> Language:
    try:
        import spacy
    except ImportError:
        raise SettingsError("names: needs the spacy package: pip install -e '.[names]'") from None
    try:
        nlp = spacy.load(pipeline)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"names: {pipeline} is not a spaCy pipeline ({reason}); {REMEDY}") from None
    if not nlp.has_pipe("ner"):
        raise SettingsError(
            f"names: {pipeline} recognises no entities (components: {nlp.pipe_names}); {REMEDY}"
        )
    return nlp


def _release(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
