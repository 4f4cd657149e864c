"""The published controllers, by hand."""

from __future__ import annotations

import pytest

from textalign_dagster.settings import SettingsError, validate
from training.objectives.base import Step
from training.objectives.nll import NLL

KL_AND_ENTROPY = NLL(kl_coef=0.05, entropy_coef=0.06, kl_target=3.0, entropy_target=40.0)


def test_one_step_by_hand() -> None:
    # 32 rows; a KL of 3.3 per sample is 10 % above its target, an entropy of 38 is 5 % below.
    coefficients, measured = KL_AND_ENTROPY.adapt(
        KL_AND_ENTROPY.start(), {"kl": 3.3 * 32, "entropy": 38.0 * 32}, Step(mass=99, weight=32, sequences=32)
    )
    assert measured == {"kl": pytest.approx(3.3), "entropy": pytest.approx(38.0)}
    assert coefficients["kl_coef"] == pytest.approx(0.05 * (1 + 0.1 * 32 / 2500))
    assert coefficients["entropy_coef"] == pytest.approx(0.06 * (1 + 0.05 * 32 / 2500))


@pytest.mark.parametrize(("kl", "factor"), [(30.0, 1 + 0.2 * 64 / 2500), (0.0, 1 - 0.2 * 64 / 2500)])
def test_error_is_clipped_at_20_percent(kl: float, factor: float) -> None:
    coefficients, _ = KL_AND_ENTROPY.adapt(
        KL_AND_ENTROPY.start(), {"kl": kl * 64, "entropy": 40.0 * 64}, Step(mass=99, weight=64, sequences=64)
    )
    assert coefficients == {"kl_coef": pytest.approx(0.05 * factor), "entropy_coef": pytest.approx(0.06)}


def test_steps_multiply_and_figures_are_weighted_means() -> None:
    coefficients = KL_AND_ENTROPY.start()
    for _ in range(3):  # four rows of weight 2
        step = Step(mass=99, weight=8, sequences=4)
        coefficients, _ = KL_AND_ENTROPY.adapt(coefficients, {"kl": 3.3 * 8, "entropy": 0.0}, step)
    assert coefficients["kl_coef"] == pytest.approx(0.05 * (1 + 0.1 * 4 / 2500) ** 3)


def test_without_a_target_a_coefficient_is_constant() -> None:
    objective = NLL(kl_coef=0.05, entropy_coef=0.06, entropy_target=40.0)
    assert objective.start() == {"entropy_coef": 0.06}
    coefficients, measured = objective.adapt(objective.start(), {"entropy": 80.0}, Step(1, 1, 1))
    assert set(measured) == set(coefficients) - {"entropy_coef"} | {"entropy"}
    assert coefficients["entropy_coef"] < 0.06
    assert NLL(kl_coef=0.05).start() == {}


def test_a_step_without_weight_changes_nothing() -> None:
    start = KL_AND_ENTROPY.start()
    assert KL_AND_ENTROPY.adapt(start, {"kl": 0.0, "entropy": 0.0}, Step(0, 0, 0)) == (start, {})
    assert start == {"kl_coef": 0.05, "entropy_coef": 0.06}


def test_a_coefficient_of_0_cannot_be_adapted() -> None:
    with pytest.raises(SettingsError, match="kl_target adapts kl_coef by factors"):
        validate(NLL, {"kl_target": 3.0}, "here")
