"""Varied exemplars through the whole loop: each prompt is conditioned on feedback that earlier samples received."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from resources.freshness import Freshness
from tests.integration.conftest import Ran
from tests.toy import PROJECT
from textalign_dagster.experiment.files import Library
from textalign_dagster.pool.exemplars import candidates


def test_varied_exemplars_through_the_loop(ran: Ran, tmp_path: Path) -> None:
    place = ran.copy(tmp_path / "place")
    # The toy generates nothing that scores 3: here 0 counts as the best, and lines are long enough to differ.
    overrides = (
        *("method.exemplar=varied", "method.scores=[0, 1, 2, 3]"),
        *("sampling.max_new_tokens=24", "datapool.max_tokens=25"),
    )
    place.textalign("run", "toy", "--no-control", *(part for o in overrides for part in ("--set", o)))
    library = Library((place.experiments, PROJECT / "experiments", place.home / "variants"))
    name = next(variant for variant in library.paths if variant.startswith("toy+"))

    assert place.frame(name, 1, "generations")["condition"].null_count() == 12
    sampled = place.frame(name, 2, "generations")
    before = candidates(place.frame(name, 1, "datapool"), "0")
    assert len(before) > 1
    assert set(sampled["condition"]) <= set(before)
    assert sampled.group_by("prompt_id").agg(pl.col("condition").n_unique())["condition"].to_list() == [1] * 4
    artifact = place.artifact(name, 2, "generations")
    assert artifact.manifest["inputs"]["datapool@1"] == place.artifact(name, 1, "datapool").key

    # Evaluated under conditions from the pool that the policy was trained on, reported under one name.
    scores, samples = (place.frame(name, 2, "evaluation", t) for t in ("scores", "evaluation_samples"))
    main = samples.filter(role="main")
    assert set(main["condition"]) <= set(candidates(place.frame(name, 2, "datapool"), "0"))
    assert set(scores.filter(role="main")["condition"]) == {"(varied)"}

    states = Freshness(place.store, name, library.load(name))
    assert [states.iteration(k).kind for k in (1, 2)] == ["fresh", "fresh"]
