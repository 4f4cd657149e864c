"""The published controllers, by hand."""

from __future__ import annotations

import pytest

from textalign_dagster.settings import SettingsError, validate
from textalign_dagster.settings.training import Objective
from training.controllers import Controllers

KL_AND_ENTROPY = Objective(kl_coef=0.05, entropy_coef=0.06, kl_target=3.0, entropy_target=40.0)


def test_one_step_by_hand() -> None:
    both = Controllers(KL_AND_ENTROPY)
    # 32 rows; a KL of 3.3 a sample is 10 % above its target, an entropy of 38 is 5 % below.
    assert both.update(kl=3.3 * 32, entropy=38.0 * 32, weight=32, rows=32) == {
        "kl": pytest.approx(3.3),
        "entropy": pytest.approx(38.0),
    }
    assert both.kl.coef == pytest.approx(0.05 * (1 + 0.1 * 32 / 2500))
    assert both.entropy.coef == pytest.approx(0.06 * (1 + 0.05 * 32 / 2500))


@pytest.mark.parametrize(("kl", "factor"), [(30.0, 1 + 0.2 * 64 / 2500), (0.0, 1 - 0.2 * 64 / 2500)])
def test_a_step_answers_to_20_percent_at_most(kl: float, factor: float) -> None:
    both = Controllers(KL_AND_ENTROPY)
    both.update(kl=kl * 64, entropy=40.0 * 64, weight=64, rows=64)
    assert both.kl.coef == pytest.approx(0.05 * factor)
    assert both.entropy.coef == pytest.approx(0.06)


def test_steps_multiply_and_weights_make_a_mean() -> None:
    both = Controllers(KL_AND_ENTROPY)
    for _ in range(3):
        both.update(kl=3.3 * 8, entropy=0.0, weight=8, rows=4)  # four rows of weight 2
    assert both.kl.coef == pytest.approx(0.05 * (1 + 0.1 * 4 / 2500) ** 3)


def test_without_a_target_a_coefficient_stays() -> None:
    one = Controllers(Objective(kl_coef=0.05, entropy_coef=0.06, entropy_target=40.0))
    assert one.active
    assert set(one.update(kl=99.0, entropy=80.0, weight=1, rows=1)) == {"entropy"}
    assert one.kl.coef == 0.05 and one.entropy.coef < 0.06
    assert set(one.coefficients()) == {"entropy_coef"}
    assert not Controllers(Objective(kl_coef=0.05)).active


def test_a_step_without_weight_changes_nothing() -> None:
    both = Controllers(KL_AND_ENTROPY)
    assert both.update(kl=0.0, entropy=0.0, weight=0.0, rows=0) == {}
    assert both.coefficients() == {"kl_coef": 0.05, "entropy_coef": 0.06}


def test_coefficients_go_on() -> None:
    both = Controllers(KL_AND_ENTROPY)
    both.resume({"kl_coef": 0.07})
    assert both.coefficients() == {"kl_coef": 0.07, "entropy_coef": 0.06}
    fixed = Controllers(Objective(kl_coef=0.05))
    fixed.resume({"kl_coef": 0.07})
    assert fixed.kl.coef == 0.05


def test_a_coefficient_of_0_cannot_be_adapted() -> None:
    with pytest.raises(SettingsError, match="kl_target adapts kl_coef by factors"):
        validate(Objective, {"kl_target": 3.0}, "here")
