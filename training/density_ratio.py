"""Importance weights for samples that another policy drew: how much more likely they are under the current one.

The datapool holds samples of earlier iterations, and files hold samples of other policies. The weight of a
sample y of a policy ρ is π(y|x)/ρ(y|x), where π is the policy that the training starts from (importance
sampling; clipped, as Ionides 2008 does, since the ratio of a long text is unbounded).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel, TrainingArguments

from training.data.batches import Collator
from training.data.examples import Example
from training.job import POLICY_TABLE, Job, JobError
from training.objectives.base import CHOSEN, REJECTED
from training.progress import Reporter
from training.reference_log_probs import tabulate
from training.settings import DensityRatio


def reweigh(
    job: Job,
    model: PreTrainedModel,
    examples: list[Example],
    collator: Collator,
    arguments: TrainingArguments,
    reporter: Reporter,
) -> tuple[list[Example], dict[str, float]]:
    """The examples with their weights multiplied by their density ratios, and figures about these ratios."""
    settings, objective = job.training.density_ratio, job.training.objective
    assert settings is not None
    if (
        job.is_own_reference
        and job.adapter is None
        and "reference log-probs" in objective.needs
        and objective.reference_sees_condition
    ):
        known = examples  # the policy is its own reference
    else:
        bare = [replace(example, reference=None, second=None) for example in examples]
        table = job.policy_log_probs, POLICY_TABLE
        known = tabulate(job, table, model, bare, replace(collator, apart=False), arguments, reporter)
    log_probs = [example.reference_log_probs or [] for example in known]
    ratios = density_ratios(examples, log_probs, settings, job.rows)
    weighed = [
        replace(example, weight=example.weight * ratio)
        for example, ratio in zip(examples, ratios, strict=True)
    ]
    low, high = settings.clip
    figures = {
        "density ratio, mean": sum(ratios) / len(ratios),
        "density ratio, clipped share": sum(not low < ratio < high for ratio in ratios) / len(ratios),
        "effective share of samples": effective_share([example.weight for example in weighed]),
    }
    reporter.say(", ".join(f"{name}: {value:.3g}" for name, value in figures.items()))
    return weighed, figures


def density_ratios(
    examples: Sequence[Example], log_probs: Sequence[Sequence[float]], settings: DensityRatio, where: str
) -> list[float]:
    """The clipped ratio of each example. Both sequences of a pair get the ratio of both texts together.

    Args:
        log_probs: of each token of each text under the policy that the training starts from, in nats.
        where: the file of the examples, for error messages.

    Raises:
        JobError: a sample's log-probability under the policy that drew it is not known.
    """
    unknown = [example.sample_id for example in examples if not math.isfinite(example.sampled_log_prob)]
    if unknown:
        raise JobError(
            f"{where}: sampled_logprob: NULL in {len(unknown)} of {len(examples)} rows, first in sample "
            f"{unknown[0]}; training.density_ratio needs it; set density_ratio to null, or leave such rows out"
        )
    sums = [(sum(of) - one.sampled_log_prob, len(of)) for one, of in zip(examples, log_probs, strict=True)]
    together: dict[int, tuple[float, int]] = {}
    for example, (gap, tokens) in zip(examples, sums, strict=True):
        if example.group is not None and example.role in (CHOSEN, REJECTED):
            before = together.get(example.group, (0.0, 0))
            together[example.group] = before[0] + gap, before[1] + tokens
    low, high = (math.log(bound) for bound in settings.clip)
    ratios = []
    for example, own in zip(examples, sums, strict=True):
        gap, tokens = own if example.group is None else together.get(example.group, own)
        if settings.per == "token":
            gap /= max(tokens, 1)
        ratios.append(math.exp(min(max(gap, low), high)))
    return ratios


def effective_share(weights: Sequence[float]) -> float:
    """Kish's effective sample size, (Σw)²/Σw², over the number of samples: 1 with equal weights."""
    return sum(weights) ** 2 / (len(weights) * sum(weight**2 for weight in weights))
