"""A sum of money that calls may not exceed, the dearest outcome of those in flight included."""

from __future__ import annotations

import threading

ROUNDING_USD = 1e-9  # sums of floats


class Budget:
    """``spent`` is known cost, ``uncertain`` the highest cost of calls whose reply was lost.

    ``limit`` in USD; None: no limit, only sums. Any thread may call; one budget may serve several
    batches.
    """

    def __init__(self, limit: float | None = None, spent: float = 0.0, uncertain: float = 0.0) -> None:
        self.limit = limit
        self.spent = spent
        self.uncertain = uncertain
        self.reserved = 0.0
        self._lock = threading.Lock()

    def reserve(self, usd: float) -> bool:
        """Set aside a call's highest cost; False when that could exceed the limit."""
        with self._lock:
            committed = self.spent + self.uncertain + self.reserved
            if self.limit is not None and committed + usd > self.limit + ROUNDING_USD:
                return False
            self.reserved += usd
            return True

    def settle(self, reserved: float, spent: float = 0.0, uncertain: float = 0.0) -> None:
        """Put what a call really cost in place of what was set aside for it."""
        with self._lock:
            self.reserved -= reserved
            self.spent += spent
            self.uncertain += uncertain
