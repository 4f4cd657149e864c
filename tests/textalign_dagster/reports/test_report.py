"""The printed score table and the plot."""

from __future__ import annotations

import io
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console

from resources.store import ArtifactStore
from resources.views import connect
from textalign_dagster import PROJECT
from textalign_dagster.experiment.files import Library
from textalign_dagster.reports.curves import as_markdown, curves, save_curves
from textalign_dagster.reports.report import placed, score_rows, score_table
from textalign_dagster.tables import SCORES

LIBRARY = Library((PROJECT / "experiments",))
NAME, CONTROL = "pep8_alt_lmu", "pep8_no_feedback"


def scores(
    policy: str, main: dict[str, float], probe: dict[str, float] | None = None, condition: str | None = "good"
) -> pl.DataFrame:
    rows = [
        {
            "policy_hash": policy,
            "metric": m,
            "condition": c,
            "role": role,
            "n": 9,
            "value": v,
            "lo": v - 1,
            "hi": v + 1,
        }
        for role, values, c in (
            ("main", main, condition),
            ("probe", probe or {}, "a [very] long probe that goes on"),
        )
        for m, v in values.items()
    ]
    return pl.DataFrame(rows, schema=SCORES)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    store = ArtifactStore(tmp_path / "store")
    base = scores("base", {"violations": 40.0, "n_tokens": 56.0}, condition=None)
    for name, k, frame in [
        (NAME, 0, base),
        (CONTROL, 0, base),
        (
            NAME,
            1,
            scores("a", {"violations": 10.0, "n_tokens": 56.0}, {"violations": 55.5, "n_tokens": 56.0}),
        ),
        (
            NAME,
            2,
            scores("b", {"violations": 5.25, "n_tokens": 56.0}, {"violations": 66.5, "n_tokens": 56.0}),
        ),
        (CONTROL, 1, scores("c", {"violations": 0.5, "n_tokens": 56.0}, condition=None)),
    ]:
        artifact = store.make(
            "evaluation",
            f"{name}-{k}",
            lambda draft, frame=frame: draft.write("scores", frame, SCORES),
            inputs={},
            settings={},
        )
        store.assign(name, k, "evaluation", artifact, settings={}, checks={})
    return store


def rendered(rows: pl.DataFrame, width: int = 140) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(score_table(rows, LIBRARY.load(NAME), NAME, width))
    return out.getvalue()


def test_rows_of_the_experiment_then_its_control_with_the_base_once(store: ArtifactStore) -> None:
    rows = score_rows(store, LIBRARY, NAME)
    cells = rows.select("experiment", "iteration").unique(maintain_order=True).rows()
    assert cells == [(NAME, 0), (NAME, 1), (NAME, 2), (CONTROL, 1)]
    assert rows.columns == [
        "experiment",
        "iteration",
        "subject",
        "role",
        "condition",
        "metric",
        "value",
        "lo",
        "hi",
        "n",
    ]
    assert score_rows(store, LIBRARY, CONTROL)["experiment"].unique().to_list() == [CONTROL]


def test_nothing_evaluated_yet(tmp_path: Path, store: ArtifactStore) -> None:
    empty = score_rows(ArtifactStore(tmp_path / "empty"), LIBRARY, NAME)
    assert empty.is_empty()
    assert empty.columns == score_rows(store, LIBRARY, NAME).columns


def test_the_table(store: ArtifactStore) -> None:
    text = rendered(score_rows(store, LIBRARY, NAME))
    caption = " ".join(text.split())
    order = (
        "iteration 0 (base policy)",
        "iteration 1",
        "iteration 2",
        "null control",
        "iteration 2, conditioned on",
    )
    places = [text.index(label) for label in order]
    assert places == sorted(places)
    assert "“a [very] long probe that…" in text  # square brackets are not markup
    assert "55.5" not in text  # only the last iteration's probes
    assert "66.5" in text
    assert "5.25" in text and "4.25–6.25" in text
    assert "0.500" in text and "-0.500–1.500" in text
    assert "tokens is 56 throughout." in caption
    assert "95 % interval" in caption


def test_a_table_that_is_too_wide_is_split_into_parts(store: ArtifactStore) -> None:
    rows = with_baselines(store).filter(pl.col("metric") != "n_tokens")
    whole, parts = rendered(rows), rendered(rows, width=50)
    assert whole.count("policy") == 1 + whole.count("base policy")
    assert parts.count("┃policy") == 2 and max(map(len, parts.splitlines())) <= 50
    for number in ("0.750", "66.5", "30.2", "5.25", "4.25–6.25"):
        assert number in whole and number in parts
    assert parts.count("baseline people") == 2  # every part has all rows
    assert parts.count(f"{NAME}: ") == 1 and parts.count("95 % interval") == 1


def test_a_table_of_one_iteration_and_one_metric(store: ArtifactStore) -> None:
    rows = placed(scores("x", {"violations": 3.0}, condition=None), NAME, 0)
    text = rendered(rows)
    assert "iteration 0 (base policy)" in text


def test_the_plot(store: ArtifactStore, tmp_path: Path) -> None:
    rows = score_rows(store, LIBRARY, NAME)
    figure = curves(rows, LIBRARY.load(NAME), NAME)
    assert len(figure.axes) == 1  # a constant is not a curve
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[0] == NAME
    assert f"{CONTROL} (null control)" in labels
    own = figure.axes[0].lines[0]
    assert list(own.get_xdata()) == [0, 1, 2]
    assert list(own.get_ydata()) == [40.0, 10.0, 5.25]
    path = save_curves(figure, tmp_path / "plots" / "x.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == ["x.png"]
    assert as_markdown(figure).startswith("![curves](data:image/png;base64,")


def test_negative_values_are_shown(store: ArtifactStore) -> None:
    rows = score_rows(store, LIBRARY, NAME).with_columns(pl.col("value", "lo", "hi") * -1)
    bottom, top = curves(rows, LIBRARY.load(NAME), NAME).axes[0].get_ylim()
    assert bottom < -40.0 and top == 0.0


def test_a_plot_of_nothing_but_constants(store: ArtifactStore, tmp_path: Path) -> None:
    rows = placed(scores("x", {"violations": 3.0}, condition=None), NAME, 0)
    save_curves(curves(rows, LIBRARY.load(NAME), NAME), tmp_path / "x.png")


def with_baselines(store: ArtifactStore) -> pl.DataFrame:
    """The rows of an experiment with two baselines and with obedience in iteration 2."""
    rows = score_rows(store, LIBRARY, NAME)
    more = [
        {"experiment": NAME, "iteration": 0, "subject": subject, "role": "baseline", "metric": "violations",
         "value": value, "lo": value, "hi": value, "n": 9}
        for subject, value in (("[SFT] model", 30.25), ("people", 1.5))
    ]  # fmt: skip
    obeys = {"experiment": NAME, "iteration": 2, "role": "main", "condition": "good", "metric": "obedience",
             "value": 0.75, "lo": 0.5, "hi": 0.875, "n": 9}  # fmt: skip
    return pl.concat([rows, pl.DataFrame([*more, obeys], schema=rows.schema)])


def test_baselines_are_listed_last_by_name(store: ArtifactStore) -> None:
    text = rendered(with_baselines(store))
    places = [text.index(label) for label in ("conditioned on", "baseline [SFT] model", "baseline people")]
    assert places == sorted(places)
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if "│" in line}
    assert "30.2" in lines["baseline [SFT] model"] and "40.0" in lines["iteration 0 (base policy)"]
    assert "obedience" in text and "0.750" in lines["iteration 2"]
    assert "throughout" in text and "obedience is" not in " ".join(text.split())


def test_the_plot_shows_only_the_experiments_own_policies(store: ArtifactStore) -> None:
    figure = curves(with_baselines(store), LIBRARY.load(NAME), NAME)
    assert len(figure.axes) == 1
    assert list(figure.axes[0].lines[0].get_ydata()) == [40.0, 10.0, 5.25]


def test_a_table_from_before_baselines_existed(store: ArtifactStore) -> None:
    old = scores("x", {"violations": 3.0}).drop("subject")
    assert placed(old, NAME, 0)["subject"].to_list() == [None]
    artifact = store.make(
        "evaluation", "old", lambda draft: draft.write("scores", old, old.schema), inputs={}, settings={}
    )
    store.assign(NAME, 3, "evaluation", artifact, settings={}, checks={})
    with connect(store) as database:
        query = "select subject, metric, value from scores where iteration = 3"
        assert database.execute(query).fetchall() == [(None, "violations", 3.0)]
