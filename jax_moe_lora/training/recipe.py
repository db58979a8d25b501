"""How an adapter is trained: which modules, and with which optimizer and schedule."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import optax

from jax_moe_lora.adapters.lora import Site
from jax_moe_lora.arguments import number, whole
from jax_moe_lora.errors import InputError
from jax_moe_lora.training.spec import AdapterSpec

Schedule = Literal["constant", "cosine", "linear"]


@dataclass(frozen=True)
class Recipe:
    """One adapter's spec, and its AdamW.

    Attributes:
      spec: what it trains. None is `AdapterSpec()`, or the spec of the adapter that training starts from.
      learning_rate: the highest.
      schedule: after the warmup the rate stays constant, or falls to zero at the last step along a cosine or a line.
      warmup: steps in which the rate rises; it is above zero in the first of them.
      weight_decay: AdamW's.
      clip: largest norm of the adapter's gradient; None clips nothing.
    """

    spec: AdapterSpec | None = None
    learning_rate: float = 2e-4
    schedule: Schedule = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float | None = 1.0

    def check(self, name: str, sites: Mapping[str, Site]) -> None:
        """Refuses what the model cannot train.

        Args:
          name: the adapter's, for errors.
          sites: the model's.

        Raises:
          InputError: a bad value, by the adapter and the field.
        """
        whose = f"of adapter {name!r}"
        if not isinstance(self.spec, AdapterSpec | None):
            raise InputError(f"spec {whose} is of type {type(self.spec).__name__}; expected an AdapterSpec.")
        (self.spec or AdapterSpec()).check(name, sites)
        above, zero = "a number above zero", "a number from zero"
        number(f"learning rate {whose}", self.learning_rate, lambda value: 0 < value < math.inf, above)
        number(f"weight decay {whose}", self.weight_decay, lambda value: 0 <= value < math.inf, zero)
        if self.clip is not None:
            number(f"clip {whose}", self.clip, lambda value: 0 < value < math.inf, above)
        if self.schedule not in get_args(Schedule):
            expected = ", ".join(get_args(Schedule))
            raise InputError(f"schedule {whose} is {self.schedule!r}; expected one of {expected}.")
        whole(f"warmup {whose}", self.warmup, 0)

    def check_schedule(self, name: str, steps: int) -> None:
        """Raises an `InputError` where the warmup does not end before the last step."""
        if self.warmup >= steps:
            raise InputError(f"warmup of adapter {name!r} is {self.warmup} of {steps} steps; give fewer than all.")

    def schedule_of(self, steps: int) -> optax.Schedule:
        """The learning rate by the number of updates so far."""
        after = {
            "constant": lambda left: optax.constant_schedule(self.learning_rate),
            "cosine": lambda left: optax.cosine_decay_schedule(self.learning_rate, left),
            "linear": lambda left: optax.linear_schedule(self.learning_rate, 0.0, left),
        }[self.schedule](steps - self.warmup)
        if not self.warmup:
            return after
        rise = optax.linear_schedule(self.learning_rate / (self.warmup + 1), self.learning_rate, self.warmup)
        return optax.join_schedules([rise, after], [self.warmup])

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """AdamW without clipping, which `make_step` adds."""
        return optax.adamw(self.schedule_of(steps), weight_decay=self.weight_decay)


def recipes_of(recipe: Recipe | Mapping[str, Recipe] | None, names: Iterable[str]) -> dict[str, Recipe]:
    """The recipe of each adapter.

    Args:
      recipe: one for all adapters, one for each, or None for the default.
      names: the adapters.

    Raises:
      InputError: the recipes are for other adapters.
    """
    names = list(names)
    for each in recipe.values() if isinstance(recipe, Mapping) else [recipe]:
        if not isinstance(each, Recipe | None):
            raise InputError(f"recipe is of type {type(each).__name__}; expected a Recipe, or one for each adapter.")
    if not isinstance(recipe, Mapping):
        return dict.fromkeys(names, recipe or Recipe())
    if set(recipe) != set(names):
        raise InputError(f"recipe names {', '.join(recipe)}; expected one for each of {', '.join(names)}.")
    return {name: recipe[name] for name in names}
