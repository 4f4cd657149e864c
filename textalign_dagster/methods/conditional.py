"""Control tokens for good and bad samples: conditional training and CSFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, cast

import polars as pl
from pydantic import Field, model_validator

from textalign_dagster.ids import derive_seed
from textalign_dagster.methods.base import ClosedConditional, FeedbackKind
from textalign_dagster.tables import SPAN


class ControlTokens(ClosedConditional):
    """A method that trains on good and bad samples, each after a new control token, and then samples good ones."""

    @property
    def wants(self) -> FeedbackKind:
        return "reward"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return self.buckets


class ConditionalTraining(ControlTokens):
    """A sample is good if its reward reaches a threshold (Korbak et al. 2023)."""

    added: ClassVar[Mapping[str, Any]] = {"tokens": "sample", "quantile": None}

    name: Literal["conditional"] = "conditional"
    template: str = Field("{condition}{prompt}", description="How a control token is prepended to a prompt.")
    threshold: float = Field(
        0.0,
        description="The lowest reward of a good sample or segment (for a segment: its negated score); 0 is a threshold, too.",
    )
    quantile: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Instead of `threshold`: the share of the samples or segments that are not good, lowest rewards first.",
    )
    tokens: Literal["sample", "segment"] = Field(
        "sample",
        description="sample: a control token before each sample; segment: before each scored segment of a corpus.",
    )
    drop_fraction: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="Share of the samples or segments that are trained on without a control token (chosen by sample "
        "id), so that the policy can be sampled without one.",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.quantile is not None and "threshold" in self.model_fields_set:
            raise ValueError("`threshold` and `quantile` are mutually exclusive; remove one of them")
        return self

    @property
    def wants(self) -> FeedbackKind:
        return "spans" if self.per_segment else "reward"

    @property
    def banned_tokens(self) -> tuple[str, ...]:
        """With a token before each segment the policy itself generates the good one; only the bad one is banned."""
        return self.buckets[1:] if self.per_segment else super().banned_tokens

    @property
    def probes(self) -> tuple[str, ...]:
        """None with a token before each segment: a policy must not be conditioned on a token that it must not generate."""
        return () if self.per_segment else super().probes

    @property
    def sweep(self) -> tuple[str, ...]:
        return (self.best,) if self.per_segment and self.exemplar is not None else super().sweep

    @property
    def per_segment(self) -> bool:
        return self.tokens == "segment"

    @property
    def buckets(self) -> tuple[str, ...]:
        return ("<|aligned|>", "<|misaligned|>")

    def label(self, rows: pl.DataFrame) -> pl.DataFrame:
        good, bad = self.buckets
        usable = (pl.col("status") == "ok") & pl.col("value").is_finite()
        lowest = self._lowest(rows.filter(usable)["value"])
        token = pl.when(pl.col("value") >= lowest).then(pl.lit(good)).otherwise(pl.lit(bad))
        label = pl.when(usable).then(token)
        return rows.with_columns(
            label=label, condition=pl.lit(None, dtype=pl.String) if self.per_segment else label
        )

    def examples(self, rows: pl.DataFrame) -> pl.DataFrame:
        """With ``tokens: segment`` the tokens are in the text; documents that contain one themselves are left out."""
        if self.per_segment:
            spelled = pl.any_horizontal(
                pl.col("text").str.contains(token, literal=True) for token in self.buckets
            )
            return super().examples(self._marked(rows.filter(~spelled)))
        without = rows["sample_id"].map_elements(self._dropped, return_dtype=pl.Boolean)
        return super().examples(rows.with_columns(condition=pl.when(~without).then(pl.col("condition"))))

    def _lowest(self, values: pl.Series) -> float:
        """The lowest reward that counts as good."""
        if self.quantile is None or values.is_empty():
            return self.threshold
        return cast(float, values.quantile(self.quantile, "nearest"))

    def _dropped(self, *drawn_by: object) -> bool:
        return derive_seed(0, "drop condition", *drawn_by) % 10_000 < 10_000 * self.drop_fraction

    def _marked(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The texts with a control token before each segment; a segment's span includes its token and keeps its score."""
        scores = (
            rows["spans"].explode().struct.field("score") if rows.height else pl.Series([], dtype=pl.Float64)
        )
        lowest = self._lowest(-scores.drop_nulls())
        good, bad = self.buckets
        texts, places = [], []
        for sample_id, text, spans in rows.select("sample_id", "text", "spans").iter_rows():
            written, marked = "", []
            for i, span in enumerate(sorted(spans or [], key=lambda span: span["start"])):
                token = "" if self._dropped(sample_id, i) else good if -span["score"] >= lowest else bad
                piece = token + text[span["start"] : span["end"]]
                marked.append({**span, "start": len(written), "end": len(written) + len(piece)})
                written += piece
            texts.append(written)
            places.append(marked)
        return rows.with_columns(
            pl.Series("text", texts, dtype=pl.String), pl.Series("spans", places, dtype=pl.List(SPAN))
        )


class CSFT(ControlTokens):
    """Good or bad by comparison with another sample of the prompt; the token follows the prompt (Ethayarajh et al. 2024).

    A prompt's best sample is compared with its worst, the second best with the second worst, and so on; samples
    with equal rewards are neither good nor bad, and the middle one of an odd number is left out.
    """

    name: Literal["csft"] = "csft"
    template: str = Field("{prompt}{condition}", description="How a control token follows a prompt.")

    @property
    def buckets(self) -> tuple[str, ...]:
        return ("<|good|>", "<|bad|>")

    def label(self, rows: pl.DataFrame) -> pl.DataFrame:
        good, bad = self.buckets
        usable = (pl.col("status") == "ok") & pl.col("value").is_finite()
        ranked = rows.filter(usable).sort("prompt_id", "value", "sample_id")
        counterpart = pl.col("value").reverse().over("prompt_id")
        better, worse = pl.col("value") > counterpart, pl.col("value") < counterpart
        label = pl.when(better).then(pl.lit(good)).when(worse).then(pl.lit(bad))
        labels = ranked.select("sample_id", label=label)
        joined = rows.drop("label", strict=False).join(
            labels, on="sample_id", how="left", maintain_order="left"
        )
        return joined.with_columns(condition="label")
