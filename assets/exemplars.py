"""The conditions of a stage's prompts: one for all, or one each."""

from collections.abc import Sequence

from assets.stage import Stage
from resources.store import ArtifactError
from textalign_dagster.methods.base import VARIED
from textalign_dagster.pool.exemplars import NoExemplarError, varied_exemplars


def exemplars_of(
    stage: Stage, prompt_ids: Sequence[str], *, pool: int
) -> tuple[list[str | None], dict[str, str]]:
    """The condition of each prompt, and the inputs that determine it.

    Args:
        prompt_ids: in any order; a prompt that occurs twice has the same condition twice.
        pool: the iteration whose datapool varied exemplars are drawn from.

    Raises:
        ArtifactError: that datapool is missing, not fresh, or has no exemplar.
    """
    method = stage.experiment.method
    if method.exemplar != VARIED:
        return [method.exemplar] * len(prompt_ids), {}
    datapool = stage.require("datapool", pool)
    try:
        texts = varied_exemplars(
            datapool.frame("datapool"),
            method.buckets[0],
            prompt_ids,
            seed=stage.experiment.seed,
            iteration=stage.cell.iteration,
        )
    except NoExemplarError as error:
        raise ArtifactError(
            f"{stage.name} of {stage.cell.experiment}, iteration {stage.cell.iteration}: {error}"
        ) from None
    return list(texts), {f"datapool@{pool}": datapool.key}
