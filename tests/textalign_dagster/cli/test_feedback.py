"""The commands that read other projects' feedback, on small files worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from textalign_dagster.cli.main import main

RATINGS = "Name a fruit.,,apple,7\nName a fruit.,,stone,1\nName a fruit.,,pear,7\n"
RANKINGS = "Name a fruit.,,apple,stone,(a)\nName a fruit.,,apple,pear,equal\nName a fruit.,,stone,pear,(a)\n"


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    ratings, rankings = tmp_path / "ratings.csv", tmp_path / "rankings.csv"
    ratings.write_text(RATINGS, encoding="utf-8")
    rankings.write_text(RANKINGS, encoding="utf-8")
    return str(ratings), str(rankings)


def textalign(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def consistency(files: tuple[str, str], *options: str) -> Result:
    formats = ("--ratings-format", "sparse_ratings", "--rankings-format", "sparse_rankings")
    return textalign("consistency", *files, *formats, *options)


def test_consistency_by_hand(files: tuple[str, str]) -> None:
    # apple 7 > stone 1: (a), agreed. apple 7 = pear 7: equal, agreed. stone 1 < pear 7, but ranked (a).
    found = json.loads(consistency(files, "--json").stdout)
    agreement = found["agreement"]
    assert agreement["agreement"]["value"] == pytest.approx(2 / 3)
    assert agreement["decisive"]["value"] == pytest.approx(1 / 2)
    assert sum(map(sum, agreement["matrix"])) == 3
    assert found["coverage"] == {"pairs": 3, "ranked": 3, "rated": 3, "both": 3}


def test_consistency_report(files: tuple[str, str]) -> None:
    output = consistency(files).stdout
    assert "agreement: 0.667, n = 3" in output
    assert "agreement where both decide: 0.500, n = 2" in output


def test_self_agreement_of_a_repeated_judge(files: tuple[str, str], tmp_path: Path) -> None:
    """Ratings: apple > stone and stone < pear both times; apple = pear, then apple > pear. Rankings: two of three agree."""
    again = tmp_path / "again.csv"
    again.write_text(RATINGS.replace("pear,7", "pear,6"), encoding="utf-8")
    ranked = tmp_path / "ranked_again.csv"
    ranked.write_text(RANKINGS.replace("equal", "(a)"), encoding="utf-8")
    output = consistency(files, "--ratings-again", str(again), "--rankings-again", str(ranked)).stdout
    assert "self-agreement of the judge, repeated ratings: 0.667, n = 3" in output
    assert "self-agreement of the judge, repeated rankings: 0.667, n = 3" in output
    refused = textalign("consistency", "a", "b", "-k", "1", "--ratings-again", str(again))
    assert refused.exit_code == 1 and "for experiments, set judge.repeats" in refused.stderr


def test_position_bias_is_not_reported_for_imported_verdicts(files: tuple[str, str]) -> None:
    output = consistency(files).stdout
    assert "shown first" not in output
    assert json.loads(consistency(files, "--json").stdout)["position"]["first_wins"]["value"] is None
    # The file's order: ratings say stone < pear (second better), the ranking says stone (first better).
    lines = {
        line.split("  ")[0]: line.split()[-3:]
        for line in output.splitlines()
        if " better" in line or line[:3] == "tie"
    }
    assert lines["first better"] == ["1", "0", "0"] and lines["second better"] == ["1", "0", "0"]


def test_pairs_of_identical_texts_are_refused_but_reported(files: tuple[str, str]) -> None:
    rankings = Path(files[1])
    same = "Name a fruit.,,apple,apple,equal\nName a fruit.,,pear,pear,(a)\nName a fruit.,,fig,fig,equal\n"
    rankings.write_text(RANKINGS + same, encoding="utf-8")
    output = consistency(files).stdout
    assert "refused, 3 × both responses are the same text" in output and "agreement: 0.667, n = 3" in output
    # Two of three agree; of the two whose text is rated, one says equal: (2 + 1) / (3 + 2).
    assert "agreement including the 2 pairs of identical texts, which are excluded above: 0.600" in output


def test_two_files_of_ratings_cannot_be_compared(files: tuple[str, str]) -> None:
    refused = textalign("consistency", files[0], files[0], "--ratings-format", "sparse_ratings",
                        "--rankings-format", "sparse_ratings")  # fmt: skip
    assert refused.exit_code == 1 and "holds no rankings" in refused.stderr


def test_refused_rows_abort_an_import(files: tuple[str, str], tmp_path: Path) -> None:
    ratings = Path(files[0])
    ratings.write_text(RATINGS + "Name a fruit.,,plum\n", encoding="utf-8")
    target = tmp_path / "plain.parquet"
    refused = textalign("import", str(ratings), str(target), "--format", "sparse_ratings")
    assert refused.exit_code == 1 and "1 of 4 rows" in refused.stderr and "line 4" in refused.stdout
    assert not target.exists()
    done = textalign("import", str(ratings), str(target), "--format", "sparse_ratings", "--skip-refused")
    assert done.exit_code == 0 and target.exists()
