"""How far a batch of judge calls is, for people."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Tally:
    """A batch so far: calls, requests (attempts) and USD of this run.

    ``lost`` counts replies that may have been paid for and were not received, in earlier runs too.
    """

    total: int = 0
    cached: int = 0
    received: int = 0
    failed: int = 0
    lost: int = 0
    requests: int = 0
    usd: float = 0.0

    @property
    def done(self) -> int:
        """Calls with an outcome."""
        return self.cached + self.received + self.failed

    def note(self, seconds: float) -> str:
        """For people: what it cost so far and, after so many seconds, how long it will take."""
        parts = [f"${self.usd:.4f}"] if self.usd else []
        if self.cached:
            parts.append(f"{self.cached:,} from the ledger")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        if self.lost:
            parts.append(f"{self.lost:,} replies lost, possibly paid")
        called = self.received + self.failed
        if called and self.done < self.total:
            parts.append(f"about {seconds / called * (self.total - self.done):.0f} s left")
        return ", ".join(parts)
