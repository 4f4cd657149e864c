"""What an evaluation measures: policies, baselines, candidates, the reference, scenarios."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import polars as pl

from assets.divergence import NAME as REFERENCE
from assets.exemplars import exemplars_of
from assets.stage import PolicyFolder, Stage
from resources.store import Artifact
from textalign_dagster.experiment.evaluation import Asked, conditions, evaluation_prompts, scenario_prompts
from textalign_dagster.experiment.policies import baselines, kl_reference
from textalign_dagster.ids import content_hash
from textalign_dagster.settings.scenarios import Scenario


@dataclass(frozen=True)
class Subject:
    """What an evaluation measures: the policy that an iteration trained (0: none yet), or a baseline."""

    policy_hash: str
    model: PolicyFolder | None  # None: the human answers
    asked: tuple[Asked, ...]
    name: str | None = None  # a baseline's
    banned_tokens: tuple[str, ...] = ()
    reward_model: Artifact | None = None  # the checkpoint, if it is not a policy
    inputs: Mapping[str, str] = field(default_factory=dict)  # in addition to the policy: name → key
    prompts: pl.DataFrame | None = None  # its own, with other seeds; None: the evaluation's
    as_it_is: bool = False  # sampled at temperature 1, whatever the evaluation's
    scenario: Scenario | None = None  # how it is sampled; None: by the evaluation's settings


class Subjects:
    """What the evaluations of one cell measure.

    Args:
        prompts: the evaluation's, as `evaluation_prompts` returns them.

    Raises:
        SettingsError: a model is not available.
    """

    def __init__(self, stage: Stage, prompts: pl.DataFrame) -> None:
        self.stage, self.experiment, self.prompts = stage, stage.experiment, prompts
        self.baselines = [
            Subject(
                content_hash("references", self.prompts["reference"].to_list())
                if model is None
                else model.policy_hash,
                None if model is None else PolicyFolder(model.path, model.policy_hash),
                (Asked(None, "baseline"),),
                name,
            )
            for name, model in baselines(self.experiment).items()
        ]
        self.candidates = None
        if self.experiment.evaluation.best_of_n is not None:
            base = stage.policy(1)
            self.candidates = Subject(
                base.policy_hash,
                base,
                (Asked(None, "baseline"),),
                "candidates",
                prompts=evaluation_prompts(self.experiment, self.experiment.evaluation.best_of_n.candidates),
            )
        self.reference = None
        if (reference := kl_reference(self.experiment)) is not None:
            self.reference = Subject(
                reference.policy_hash,
                PolicyFolder(reference.path, reference.policy_hash),
                (Asked(None, "baseline"),),
                REFERENCE,
                as_it_is=True,
            )

    def trained(self, iteration: int) -> Subject:
        """The policy that an iteration trained; 0: the base policy."""
        model = self.stage.policy(iteration + 1)
        asked, inputs = self._asked(iteration, self.prompts)
        # The base policy does not know the method's tokens.
        banned = self.experiment.method.banned_tokens if iteration else ()
        reward_model = None
        if iteration and self.experiment.method.trains == "reward model":
            reward_model = self.stage.require("checkpoint", iteration)
            inputs = {f"checkpoint@{iteration}": reward_model.key}
        return Subject(
            model.policy_hash,
            model,
            tuple(asked),
            banned_tokens=banned,
            reward_model=reward_model,
            inputs=inputs,
        )

    def scenarios(self, iteration: int) -> list[Subject]:
        """The policy that an iteration trained, as each of `evaluation.scenarios` samples it."""
        found, own = [], self.trained(iteration)
        for name, scenario in self.experiment.evaluation.scenarios.items():
            prompts = scenario_prompts(self.experiment, name)
            asked = replace(self._asked(iteration, prompts)[0][0], role="scenario")
            found.append(replace(own, name=name, asked=(asked,), prompts=prompts, scenario=scenario))
        return found

    def _asked(self, iteration: int, prompts: pl.DataFrame) -> tuple[list[Asked], dict[str, str]]:
        """The conditions of these prompts for an iteration's policy, and the inputs that determine them."""
        asked, inputs = conditions(self.experiment, iteration), dict[str, str]()
        if iteration:
            ids = prompts["prompt_id"].to_list()
            texts, inputs = exemplars_of(self.stage, ids, pool=iteration)
            if inputs:  # one condition for all depends on the settings only
                asked[0] = replace(asked[0], texts=dict(zip(ids, texts, strict=True)))
        return asked, inputs
