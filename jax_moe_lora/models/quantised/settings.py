"""What a config says of how its checkpoint is quantised."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Quantisation:
    """A `quantization_config`, as far as it matters here.

    Attributes:
      method: its `quant_method`.
      forms: the forms that its matrices may have (`forms.FORMS`).
      block: rows and columns that share a scale of fp8; None where the file's shapes say.
      group: columns that share a scale of int4, 0 for all of a row; None where the file's shapes say.
      ignored: modules that are not quantised, as the config spells them (`listed.py`).
    """

    method: str
    forms: tuple[str, ...]
    block: tuple[int, int] | None = None
    group: int | None = None
    ignored: tuple[str, ...] = ()
