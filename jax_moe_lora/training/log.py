"""The log of a run: a line of metrics for every step, and reports of its progress."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import optax

from jax_moe_lora.errors import InputError
from jax_moe_lora.training.scoring import Evaluation
from jax_moe_lora.training.step import Metrics
from jax_moe_lora.training.trackers import Sink


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
      step: steps that are done.
      steps: all steps of the run.
      losses: adapter -> its loss in the last step, in nats per token.
      rates: adapter -> tokens per second since the last report, prompts included, padding not.
      evaluations: adapter -> its evaluation, where this step is followed by one.
    """

    step: int
    steps: int
    losses: Mapping[str, float]
    rates: Mapping[str, float]
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)


class Log:
    """Keeps metrics on the device and fetches many at once, since each fetch waits for the device."""

    def __init__(
        self,
        schedules: Mapping[str, optax.Schedule],
        steps: int,
        sinks: Sequence[Sink],
        report: Callable[[Progress], None] | None,
    ):
        self._schedules, self._steps, self._sinks, self._report = schedules, steps, sinks, report
        self._pending: list[tuple[int, Metrics]] = []
        self._last = time.perf_counter()

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step, which may still be computed."""
        self._pending.append((step, metrics))

    def write(self, evaluations: Mapping[str, Evaluation]) -> None:
        """Writes the lines of all steps that were added.

        Args:
          evaluations: adapter -> its evaluation after the last of these steps.

        Raises:
          InputError: losses or gradients that are not finite, by adapter; the lines of the steps before are written.
        """
        pending, self._pending, lines = jax.device_get(self._pending), [], []
        for step, metrics in pending:
            lines.append(self._line(step, metrics))
            self._write(lines[-1])
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        step, last = lines[-1]["step"], lines[-1]["adapters"]
        if evaluations:
            self._write({"step": step, "evaluation": {name: asdict(result) for name, result in evaluations.items()}})
        for sink in self._sinks:
            sink.sync()
        if self._report is not None:
            tokens = {name: sum(line["adapters"][name]["tokens"] for line in lines) for name in last}
            self._report(
                Progress(
                    step,
                    self._steps,
                    {name: figures["loss"] for name, figures in last.items()},
                    {name: count / seconds for name, count in tokens.items()},
                    evaluations,
                )
            )

    def _write(self, line: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(line)

    def _line(self, step: int, metrics: Metrics) -> dict[str, Any]:
        losses, adapters, lost = metrics.losses, {}, []
        for slot, (name, schedule) in enumerate(self._schedules.items()):
            figures = {
                "loss": float(losses.loss[slot]),
                "router_loss": float(losses.router[slot]),
                "gradient_norm": float(metrics.gradient_norm[slot]),
                "learning_rate": float(schedule(step - 1)),
                "tokens": int(losses.tokens[slot]),
            }
            if not all(map(math.isfinite, figures.values())):
                lost.append(f"{name!r} (loss {figures['loss']:g}, gradient of norm {figures['gradient_norm']:g})")
            adapters[name] = figures
        if lost:
            raise InputError(
                f"At step {step} these adapters are no longer finite: {', '.join(lost)}; begin again with a lower "
                "learning rate or a warmup."
            )
        return {"step": step, "adapters": adapters}
