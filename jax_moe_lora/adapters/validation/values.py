"""What can only be said of weights that were read."""

from dataclasses import dataclass

import numpy as np

from jax_moe_lora.adapters.formats.problems import Problems
from jax_moe_lora.adapters.formats.weights import AdapterTensors
from jax_moe_lora.adapters.validation.bank_rules import all_finite, not_finite
from jax_moe_lora.adapters.validation.finding import Finding
from jax_moe_lora.errors import AdapterFormatError

# Matrices start at a root mean square of about 1 / sqrt(width), and training moves it by less than this.
ABSURD = 10.0


@dataclass(frozen=True)
class CheckedTensors:
    """The tensors of a file, each checked when a reader takes it.

    Attributes:
      tensors: the file.
      dtype: of the bank.
      problems: where errors go.
      warnings: where warnings go.
    """

    tensors: AdapterTensors
    dtype: np.dtype
    problems: Problems
    warnings: list[Finding]

    def get_tensor(self, name: str) -> np.ndarray:
        values, path = self.tensors.get_tensor(name), self.tensors.path
        with self.problems:
            if not all_finite(values, self.dtype):
                why, expected = f"{path}: {name} {not_finite(self.dtype)}.", "finite values"
                raise AdapterFormatError(why, file=path, key=name, found="infinity or NaN", expected=expected)
            self._look_for_oddities(name, values)
        return values

    def _look_for_oddities(self, name: str, values: np.ndarray) -> None:
        # In float64, so that squares stay finite; row by row, so that a copy of one row is all it takes.
        square = sum(float(np.square(row.astype(np.float64)).sum()) for row in np.atleast_2d(values))
        size = (square / max(values.size, 1)) ** 0.5
        if not square:
            self._warn(name, "all its values are zero, so that it changes nothing", "zeros", "values other than zero")
        elif size > ABSURD:
            shown = f"a root mean square of {size:.3g}"
            self._warn(name, f"it has {shown}; is it scaled?", shown, f"at most {ABSURD:g}")

    def _warn(self, name: str, problem: str, found: str, expected: str) -> None:
        path = str(self.tensors.path)
        self.warnings.append(Finding("warning", path, name, expected, found, f"{path}: {name}: {problem}."))
