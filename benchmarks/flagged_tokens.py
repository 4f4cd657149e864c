"""Do the tokens that CUT flags lie where the linter found faults? Prints shares with intervals, and draws a picture.

    textalign run pep8_cut
    python -m benchmarks.flagged_tokens pep8_cut --iteration 1 --picture flagged.png

Reads the judged samples that an iteration was trained on with the policies before and after the training, as the
objective does: once under their judgment and once under the bare prompt; and, as a control, under another text's
judgment. A token is flagged if the judgment makes it more than `training.objective.threshold` times as likely. Counts
how many of the flagged tokens, and of all tokens, overlap what the task marks. Intervals resample prompts.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import polars as pl

from textalign_dagster.cli.command import library_of, open_store
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.policies import base_policy
from textalign_dagster.measures.bootstrap import ClusterSums, difference, estimate, ratio_sums

SHOWN = 6  # samples in the picture
COLOURS = {"flagged": "#fca5a5", "both": "#f87171", "marked": "#fde68a"}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flagged_tokens",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", help="one that was run with method cut and a task that marks faults")
    parser.add_argument("--iteration", type=int, default=1)
    parser.add_argument("--picture", type=Path, help="PNG to write")
    options = parser.parse_args()
    library, name = library_of(options.experiment)
    experiment, store = library.load(name), open_store()
    artifacts = {
        stage: pointer.artifact
        for stage in ("datapool", "generations", "checkpoint")
        if (pointer := store.pointer(name, options.iteration, stage)) is not None
    }
    if len(artifacts) < 3 or experiment.method.name != "cut" or "spans" not in experiment.task.kinds:
        parser.error(
            f"{name}: was not run to iteration {options.iteration} with method cut and a task that marks faults"
        )
    before = store.pointer(name, options.iteration - 1, "checkpoint") if options.iteration > 1 else None
    policies = {
        "before": base_policy(experiment).path if before is None else before.artifact.path("model"),
        "after": artifacts["checkpoint"].path("model"),
    }
    judged = artifacts["datapool"].frame("examples").filter(pl.col("second_prompt").is_not_null())
    judged = judged.sort("example_id")
    prompts = artifacts["generations"].frame("generations").select("sample_id", "prompt_id")
    marks = experiment.task.spans(judged)
    # Does the content of a judgment matter? Each text under that of its neighbour.
    others = judged.with_columns(pl.col("condition").shift(1, fill_value=judged["condition"][-1]))
    for when, policy in policies.items():
        for of, rows in (("its own judgment", judged), ("another text's judgment", others)):
            tokens = flagged_tokens(experiment, policy, rows, marks).join(prompts, on="sample_id")
            flagged = tokens.filter("flagged")
            hits, chance = faults(flagged), faults(tokens)
            apart, share = difference(hits, chance), flagged.height / tokens.height
            print(f"{when} training, under {of}: {share:.3f} of {tokens.height} tokens flagged")
            for what, one in (("flagged tokens at a fault", hits), ("any token at a fault", chance)):
                rate = estimate(one)
                print(f"  {what:26} {rate.value:.3f} ({rate.lo:.3f} to {rate.hi:.3f})")
            print(f"  {'more often than chance by':26} {apart.value:.3f} ({apart.lo:.3f} to {apart.hi:.3f})")
            if options.picture is not None and when == "after" and rows is judged:
                picture(judged, tokens, options.picture)


def faults(tokens: pl.DataFrame) -> ClusterSums:
    """The number of tokens that lie at a fault, and of all tokens, by prompt."""
    marked = tokens["marked"].cast(pl.Float64).to_list()
    return ratio_sums(marked, [1.0] * tokens.height, tokens["prompt_id"].to_list())


def flagged_tokens(
    experiment: Experiment, policy: Path, judged: pl.DataFrame, marks: pl.DataFrame
) -> pl.DataFrame:
    """The tokens of judged texts: sample_id, start, end, flagged, marked; end tokens are left out."""
    import torch

    from training.data.batches import Collator
    from training.data.examples import encode
    from training.forward import labelled_tokens
    from training.job import Job
    from training.objectives.tokens import target_log_probs
    from training.state.model_folder import load_model, load_tokenizer

    tokenizer, model = load_tokenizer(str(policy)), load_model(str(policy), "float32").eval()
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            rows="rows",
            policy=str(policy),
            out=folder,
            template=experiment.method.template,
            training=experiment.training,
        )
        examples = encode(judged, tokenizer, job)
    texts = dict(judged.select("sample_id", "text").iter_rows())
    threshold = math.log(experiment.training.objective.model_dump()["threshold"])
    pad = tokenizer.pad_token_id or 0
    places = marks.select("sample_id", "start", "end").rows_by_key("sample_id")
    rows: list[tuple[Any, ...]] = []
    for at in range(0, len(examples), 16):
        batch = examples[at : at + 16]
        inputs: dict[str, Any] = Collator(pad=pad)(batch)
        with torch.no_grad():
            read = labelled_tokens(model, inputs, "")
        assert read.second is not None and read.second_places is not None
        of = read.second_places
        under = target_log_probs(read.log_probs, read.targets)[of]
        ratios = under - target_log_probs(read.second, read.targets[of])
        for i, example in enumerate(batch):
            flags = (ratios[read.rows[of] == i] > threshold).tolist()
            text = texts[example.sample_id]
            offsets = tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
            )
            for (start, end), flag in zip(offsets["offset_mapping"], flags, strict=False):
                marked = any(s < end and start < e for s, e in places.get(example.sample_id, ()))
                rows.append((example.sample_id, start, end, flag, marked))
    return pl.DataFrame(rows, ["sample_id", "start", "end", "flagged", "marked"], orient="row")


def picture(judged: pl.DataFrame, tokens: pl.DataFrame, path: Path) -> None:
    """Samples with their judgments: flagged tokens red, marked ones yellow, those that are both dark red."""
    from matplotlib.figure import Figure

    shown = judged.head(SHOWN)
    figure = Figure(figsize=(11, 2.1 * SHOWN))
    for place, row in enumerate(shown.iter_rows(named=True), start=1):
        axes = figure.add_subplot(SHOWN, 1, place)
        axes.set_axis_off()
        axes.set_xlim(0, 100)
        axes.set_title(str(row["condition"]), fontsize=8, loc="left")
        line, column = 0, 0
        for start, end, flagged, marked in (
            tokens.filter(sample_id=row["sample_id"]).select("start", "end", "flagged", "marked").iter_rows()
        ):
            kind = "both" if flagged and marked else "flagged" if flagged else "marked" if marked else None
            for character in row["text"][start:end]:
                if character == "\n":
                    line, column = line + 1, 0
                    continue
                box = None if kind is None else {"facecolor": COLOURS[kind], "edgecolor": "none", "pad": 0.6}
                axes.text(column, -line, character, family="monospace", fontsize=8, bbox=box)
                column += 1
        axes.set_ylim(-max(line, 6) - 0.5, 1)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
