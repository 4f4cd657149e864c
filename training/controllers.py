"""Coefficients that adapt: the KL and entropy controllers published with Quark and ALT (toxicity)."""

from __future__ import annotations

from dataclasses import dataclass

from textalign_dagster.settings.training import Objective

LIMIT = 0.2  # of the relative error that a step answers to


@dataclass
class Controller:
    """Moves a coefficient by ``1 + sign * clip(value / target - 1, ±0.2) * rows / horizon`` a step.

    ``sign`` is 1 for a penalty (the KL: too much of it, and the coefficient rises) and -1 for a
    bonus (the entropy: too much of it, and the coefficient falls). No target: it stays as it is.
    """

    coef: float
    target: float | None
    horizon: float
    sign: int

    def update(self, value: float, rows: float) -> None:
        """After a step on ``rows`` rows whose mean (see ``Controllers.update``) was ``value``."""
        if self.target is not None:
            error = min(max(value / self.target - 1, -LIMIT), LIMIT)
            self.coef *= 1 + self.sign * error * rows / self.horizon


class Controllers:
    """Both coefficients of one training."""

    def __init__(self, settings: Objective):
        horizon = settings.controller_horizon
        self.kl = Controller(settings.kl_coef, settings.kl_target, horizon, sign=1)
        self.entropy = Controller(settings.entropy_coef, settings.entropy_target, horizon, sign=-1)

    @property
    def active(self) -> bool:
        """Whether any coefficient adapts."""
        return self.kl.target is not None or self.entropy.target is not None

    def coefficients(self) -> dict[str, float]:
        """Those that adapt, by the name of their setting."""
        named = {"kl_coef": self.kl, "entropy_coef": self.entropy}
        return {name: one.coef for name, one in named.items() if one.target is not None}

    def resume(self, coefficients: dict[str, float]) -> None:
        """Goes on with the coefficients of an earlier training, as far as they adapt here."""
        for name, one in {"kl_coef": self.kl, "entropy_coef": self.entropy}.items():
            if one.target is not None:
                one.coef = coefficients.get(name, one.coef)

    def update(self, kl: float, entropy: float, weight: float, rows: float) -> dict[str, float]:
        """After a step; returns the means it was answered with, by name.

        As published, they are means over samples of the *sum* over a sample's tokens (targets such
        as KL 3 and entropy 40 of 20 tokens mean that).

        Args:
            kl: weighted sum over the step's tokens, of all micro-batches and processes; so is ``entropy``.
            weight: sum of the step's row weights.
            rows: how many rows have a weight above 0.
        """
        if weight <= 0:
            return {}
        means = {"kl": kl / weight, "entropy": entropy / weight}
        self.kl.update(means["kl"], rows)
        self.entropy.update(means["entropy"], rows)
        return {name: means[name] for name in means if getattr(self, name).target is not None}
