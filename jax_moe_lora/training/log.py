"""What a run says: a line of metrics for every step, and now and then how far it is."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import optax

from jax_moe_lora.errors import InputError
from jax_moe_lora.training.run_folder import MetricsFile
from jax_moe_lora.training.scoring import Evaluation
from jax_moe_lora.training.step import Metrics


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
      step, steps: done, and of how many. losses: adapter -> its loss in the last step, in nats a token.
      rates: adapter -> its tokens a second since the last time, prompts included and padding not.
      evaluations: adapter -> what it does on its evaluation examples, where this step is followed by an evaluation.
    """

    step: int
    steps: int
    losses: Mapping[str, float]
    rates: Mapping[str, float]
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)


class Log:
    """Collects metrics on the device and fetches many at once, for fetching waits until they are there."""

    def __init__(
        self,
        schedules: Mapping[str, optax.Schedule],
        steps: int,
        file: MetricsFile,
        report: Callable[[Progress], None] | None,
    ):
        self._schedules, self._steps, self._file, self._report = schedules, steps, file, report
        self._pending: list[tuple[int, Metrics]] = []
        self._began = self._last = time.perf_counter()

    def add(self, step: int, metrics: Metrics) -> None:
        self._pending.append((step, metrics))

    def write(self, evaluations: Mapping[str, Evaluation]) -> None:
        """Writes the lines of all steps that were added.

        Raises:
          InputError: a loss or a gradient that is not finite; its adapter is lost, and its last checkpoint is not.
        """
        lines = [self._line(step, metrics) for step, metrics in jax.device_get(self._pending)]
        self._pending = []
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        for line in lines:
            self._file.write({**line, "seconds": round(now - self._began, 3)})
        step, last = lines[-1]["step"], lines[-1]["adapters"]
        if evaluations:
            self._file.write({"step": step, "evaluation": {name: asdict(own) for name, own in evaluations.items()}})
        if self._report is not None:
            tokens = {name: sum(line["adapters"][name]["tokens"] for line in lines) for name in last}
            self._report(
                Progress(
                    step,
                    self._steps,
                    {name: own["loss"] for name, own in last.items()},
                    {name: count / seconds for name, count in tokens.items()},
                    evaluations,
                )
            )

    def _line(self, step: int, metrics: Metrics) -> dict[str, Any]:
        losses, adapters = metrics.losses, {}
        for slot, (name, schedule) in enumerate(self._schedules.items()):
            own = {
                "loss": float(losses.loss[slot]),
                "router_loss": float(losses.router[slot]),
                "gradient_norm": float(metrics.gradient_norm[slot]),
                "learning_rate": float(schedule(step - 1)),
                "tokens": int(losses.tokens[slot]),
            }
            if not all(map(math.isfinite, own.values())):
                raise InputError(
                    f"Adapter {name!r} has loss {own['loss']:g} and a gradient of norm {own['gradient_norm']:g} at "
                    f"step {step}; begin again with a lower learning rate or a warmup."
                )
            adapters[name] = own
        return {"step": step, "adapters": adapters}
