"""Human feedback: the loop stops, samples are exported, judgements are imported, and the loop continues."""

from __future__ import annotations

import json
from pathlib import Path

from tests.integration.conftest import Place

EXPERIMENT = """
extends: toy
control: null
iterations: 1
method: {ask_for: fine, probe: []}
scorer: {name: imported, path: "people_{iteration}.jsonl", kind: text}
evaluation: {scorer: pii}
"""


def test_loop_with_human_feedback(place: Place, tmp_path: Path) -> None:
    (place.experiments / "people.yaml").write_text(EXPERIMENT, encoding="utf-8")
    stopped = place.textalign("run", "people", ok=False).stderr
    assert "people_1.jsonl does not exist yet" in stopped
    assert "textalign export EXPERIMENT samples.jsonl -k 1" in stopped

    out = tmp_path / "samples.jsonl"
    assert "samples only: 12 rows" in place.textalign("export", "people", str(out), "-k", "1").stdout
    refused = place.textalign("export", "people", str(out), "-k", "1", "--format", "alt", ok=False).stderr
    assert "has no feedback yet; --format plain writes its samples" in refused

    samples = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    judged = [
        {**sample, "feedback": "fine" if good else "poor", "value": 3 * good}
        for sample, good in zip(samples, [1, 0] * 5, strict=False)  # two are left unjudged
    ]
    answers = "".join(json.dumps(row) + "\n" for row in judged)
    (place.experiments / "people_1.jsonl").write_text(answers, encoding="utf-8")
    place.textalign("run", "people", "--set", "checks.max_unusable_feedback=0.2")

    (name,) = [path.stem for path in (place.home / "variants").glob("people*.yaml")]
    rows = {row["sample_id"]: row for row in place.frame(name, 1, "feedback").iter_rows(named=True)}
    for sample, answer in zip(samples, judged, strict=False):
        imported = rows[sample["sample_id"]]
        assert (imported["text"], imported["value"], imported["status"]) == (
            answer["feedback"],
            answer["value"],
            "ok",
        )
    unjudged = [row for row in rows.values() if row["status"] != "ok"]
    assert [row["status"] for row in unjudged] == ["skipped"] * 2
    assert {row["reason"] for row in unjudged} == {"no judgement in the file"}
    assert all(row["value"] is None for row in unjudged)
