"""One measured value and how to predict it. Pure data."""

from collections.abc import Callable
from dataclasses import dataclass

from brigade.plan.rates import Calibration

SD = {"A": 0.035, "B": 0.06, "C": 0.25}
"""Standard deviation of the logarithm of a measured value, by the point's grade."""
ROW_SD = {"tpot": 0.16, "ttft": 0.35}
"""The same for InferenceX's rows."""


class BadPoints(ValueError):
    """A file of measurements that cannot be read. The message names the file, the point and the field."""


@dataclass(frozen=True)
class Case:
    """One measured value and how to predict it."""

    name: str
    source: str
    engine: str
    hardware: str
    phase: str
    """prefill, decode, mixed (a rate), tpot or ttft."""
    kind: str
    """wide (an EP unit over several nodes), unit (a single phase), box, row (agg), rows (disagg)."""
    workload: str
    metric: str
    measured: float
    sd: float
    predict: Callable[[Calibration], float]

    def __post_init__(self) -> None:
        if not 0 < self.measured < float("inf"):
            raise BadPoints(f"{self.name}: measured {self.metric} must be more than 0, not {self.measured}")

    def predicted(self, c: Calibration) -> float:
        """Raises BadPoints where its configuration cannot be."""
        try:
            return self.predict(c)
        except (ArithmeticError, ValueError) as e:
            raise BadPoints(f"{self.name}: {self.metric} cannot be predicted from what is said ({e})") from e
