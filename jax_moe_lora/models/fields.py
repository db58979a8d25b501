"""Reading a `config.json` field by field, so that no field with an effect is passed over."""

import math
from collections.abc import Mapping
from typing import Any

from jax_moe_lora.errors import ConfigError
from jax_moe_lora.models.neutral_fields import Values, why_refused

QUANTISED = ("quantization_config", "compression_config", "quantization")


class Fields:
    """A config's fields; each one that is read is ticked off, and `refuse_unknown` names what is left."""

    def __init__(
        self, raw: Mapping[str, Any], source: str, neutral: Values | None = None, any_value: tuple[str, ...] = ()
    ):
        """Opens a config.

        Args:
          raw: its fields.
          source: what errors call the file.
          neutral: the family's own neutral fields, as in `neutral_fields.ONE_VALUE`.
          any_value: the family's own fields that are passed over whatever they say.
        """
        self._raw, self.source = raw, source
        self._neutral, self._any_value = neutral or {}, frozenset(any_value)
        self._seen: set[str] = set()

    def error(self, problem: str, name: str = "") -> ConfigError:
        """An error to raise.

        Args:
          problem: the sentence, without its full stop.
          name: the field.
        """
        value = self._raw.get(name, "nothing")
        return ConfigError(f"{self.source}: {problem}.", file=self.source, key=name, found=repr(value)[:200])

    def get(self, name: str, default: Any = None) -> Any:
        self._seen.add(name)
        value = self._raw.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(f"{name} is {value!r}, a whole number of at least 1 was expected", name)
        return value

    def count(self, name: str, default: int) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(f"{name} is {value!r}, a whole number of at least 0 was expected", name)
        return value

    def optional_size(self, name: str) -> int | None:
        return None if self.get(name) is None else self.size(name)

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(f"{name} is {value!r}, a number was expected", name)
        return float(value)

    def optional_positive(self, name: str) -> float | None:
        return None if self.get(name) is None else self.positive(name)

    def positive(self, name: str, default: float | None = None) -> float:
        value = self.number(name, default)
        if value <= 0:
            raise self.error(f"{name} is {value}, a positive number was expected", name)
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(f"{name} is {value!r}, true or false was expected", name)
        return value

    def choice(self, name: str, choices: Mapping[str, Any]) -> Any:
        value = self.get(name)
        if not isinstance(value, str) or value not in choices:
            raise self.error(f"{name} is {value!r}, supported are {', '.join(choices)}", name)
        return choices[value]

    def indices(self, name: str, below: int) -> frozenset[int]:
        value = self.get(name, [])
        if not isinstance(value, list) or not all(isinstance(i, int) and 0 <= i < below for i in value):
            raise self.error(f"{name} is {value!r}, a list of layers below {below} was expected", name)
        return frozenset(value)

    def expect(self, name: str, allowed: tuple[Any, ...], why: str) -> None:
        if self.get(name) not in allowed:
            raise self.error(f"{name} is {self.get(name)!r}: {why}", name)

    def expect_all(self, name: str, wanted: Any, count: int) -> None:
        value = self.get(name)
        if value is not None and value != [wanted] * count:
            raise self.error(f"{name} is {value!r}, only {wanted!r} in all {count} layers is supported", name)

    def token_ids(self, name: str, generation: Mapping[str, Any] | None) -> tuple[int, ...]:
        """An id, a list of ids, or nothing; `generation_config.json` wins."""
        value = self.get(name)
        if generation and generation.get(name) is not None:
            value = generation[name]
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.error(f"{name} is {value!r}, a token id or a list of them was expected", name)
        return tuple(ids)

    def refuse_unknown(self) -> None:
        """Raises a `ConfigError` for a field that was not read and that `neutral_fields` does not call neutral."""
        for name, value in self._raw.items():
            if name not in self._seen and (why := why_refused(name, self._raw, self._neutral, self._any_value)):
                raise self.error(f"the field {name} = {value!r} {why}", name)
