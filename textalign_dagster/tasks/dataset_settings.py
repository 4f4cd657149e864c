"""Where the prompts of a task come from: the section ``task.data`` of an experiment."""

from __future__ import annotations

from pydantic import Field, model_validator

from textalign_dagster.settings import Settings


class Dataset(Settings):
    """Where a task's prompts come from; without `hub` and `path`: the embedded sample."""

    hub: str | None = Field(None, description="A dataset on the hub, as owner/name.")
    revision: str | None = Field(
        None, description="Branch, tag or commit of the hub dataset; the commit is recorded either way."
    )
    path: str | None = Field(
        None,
        description="A .jsonl, .jsonl.gz, .csv or .parquet file, or a folder of such files, in the schema of the "
        "hub dataset; relative to the experiment file.",
    )
    train: str = Field(
        "train",
        description="The files of the training prompts: a word in their path (`train`), or a pattern such "
        "as `harmless-*/train*`. If no path has the word of either split, all files are for training.",
    )
    evaluation: str = Field("test", description="The files of the held-out prompts, named like `train`.")
    held_out: int | None = Field(
        None,
        ge=1,
        description="For datasets without an evaluation split: number of training prompts, chosen by a hash "
        "of their text, to hold out for the evaluation.",
    )
    columns: dict[str, str] = Field(
        {}, description="What the task reads → its column, if it has another name; `a.b` is nested."
    )
    max_refused: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Maximum share of unusable rows (blank, duplicate, …), which are left out; more is an error.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Dataset:
        if self.hub is not None and self.path is not None:
            raise ValueError("hub and path are two sources; remove one of them")
        if self.hub is not None and self.hub.count("/") != 1:
            raise ValueError(f"hub: {self.hub!r} is not owner/name")
        if self.revision is not None and self.hub is None:
            raise ValueError("revision is only for a hub dataset; add hub, or remove it")
        if self.held_out is not None and self.hub is None and self.path is None:
            raise ValueError("held_out is for a hub or a path; the embedded sample has held-out prompts")
        return self
