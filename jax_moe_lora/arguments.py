"""Checks of what callers give: each returns the value in the form that the library uses, or raises an InputError."""

import difflib
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Unpack, get_args, get_origin

import ml_dtypes
import numpy as np

from jax_moe_lora.errors import InputError

INT32 = 2**31 - 1
_ANY_WAY, _BY_KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY


def whole(name: str, value: Any, lowest: int, highest: int = INT32) -> int:
    """A whole number within bounds; errors call it `name`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputError(f"{name} is {value!r}; expected a whole number.")
    if not lowest <= value <= highest:
        raise InputError(f"{name} is {_shown(value)}; expected {lowest} to {highest}.")
    return int(value)


def number(name: str, value: Any, holds: Callable[[float], bool], expected: str) -> float:
    """A number for which `holds` is true, which errors put in words as `expected`."""
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not is_number or not holds(value):  # compared as it came: an integer of 400 digits has no float
        raise InputError(f"{name} is {_shown(value)}; expected {expected}.")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """True or false, and nothing that merely counts as one of them."""
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name} is {value!r}; expected True or False.")
    return bool(value)


def one_of[Name: str](name: str, value: Any, choices: Sequence[Name]) -> Name:
    """One of a few texts; errors call it `name`."""
    if value not in choices:
        raise InputError(f"{name} is {value!r}; expected {' or '.join(choices)}.")
    return value


def sequence(name: str, values: Any) -> Sequence[Any]:
    """A list, a tuple or an array along its first axis; a text or bytes are none."""
    if is_array(values) and values.ndim:
        return list(host_array(values))
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise InputError(f"{name} is of type {type(values).__name__}; expected a list.")
    return values


def per_prompt(name: str, values: Any, count: int) -> list[Any]:
    """One value for each prompt, out of one for all or a list of them."""
    if is_array(values):
        values = host_array(values).tolist()
    if isinstance(values, str) or not isinstance(values, Sequence):
        return [values] * count
    if len(values) != count:
        raise InputError(f"{name} has {len(values)} values for {count} prompts; give one, or one for each.")
    return list(values)


def array(name: str, values: Any) -> np.ndarray:
    """The values as a numpy array.

    Args:
      name: what errors call them.
      values: a sequence, nested to any depth, or an array.

    Raises:
      InputError: rows of different lengths.
    """
    try:
        return host_array(values)
    except ValueError as error:  # rows of different lengths
        raise InputError(f"{name} is no array; expected rows of one length, padded on the right.") from error


def suggest_keywords[T: type](cls: T) -> T:
    """A class decorator: a public method, or `__init__`, that is called with an unknown keyword names the nearest one.

    Args:
      cls: the class. A method's `**options` are keywords too: those of its `TypedDict`.
    """
    for name, value in list(vars(cls).items()):
        function = value.__func__ if isinstance(value, classmethod) else value
        if inspect.isfunction(function) and (name == "__init__" or not name.startswith("_")):
            wrapped: Any = _suggesting(function, cls.__name__ if name == "__init__" else name)
            setattr(cls, name, classmethod(wrapped) if isinstance(value, classmethod) else wrapped)
    return cls


def _suggesting(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function, with a `TypeError` that says which keyword is near an unknown one."""
    parameters = inspect.signature(function).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind in (_ANY_WAY, _BY_KEYWORD)][1:]
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            if get_origin(parameter.annotation) is not Unpack:
                return function
            known += get_args(parameter.annotation)[0].__annotations__

    @wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        for keyword in keywords:
            if keyword not in known:
                near = difflib.get_close_matches(keyword, known, 1, 0.5)
                advice = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known) or 'none'}."
                raise TypeError(f"{name}() got an unexpected keyword argument {keyword!r}{advice}")
        return function(*arguments, **keywords)

    return call


def is_array(value: Any) -> bool:
    """Of numpy, jax or torch, importing neither of the latter: as long as nobody has, there are no arrays of theirs."""
    jax = sys.modules.get("jax")
    return isinstance(value, np.ndarray) or (jax is not None and isinstance(value, jax.Array)) or is_torch(value)


def is_torch(value: Any) -> bool:
    """A tensor of torch, without importing it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, getattr(torch, "Tensor", ()))


def is_traced(value: Any) -> bool:
    """An array inside of jax's jit or grad, which has no values yet."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.core.Tracer)


def host_array(values: Any) -> np.ndarray:
    """numpy's view of an array, or its copy where it is not in host memory; a torch tensor without its gradient."""
    if not is_torch(values):
        return np.asarray(values)
    tensor = values.detach().cpu()
    if str(tensor.dtype) != "torch.bfloat16":
        return tensor.numpy()
    return tensor.view(sys.modules["torch"].int16).numpy().view(ml_dtypes.bfloat16)  # which numpy does not have


def _shown(value: Any) -> str:
    """Python refuses to print integers of thousands of digits, and nobody reads hundreds."""
    return "an endless number" if isinstance(value, int) and abs(value) > 2**64 else repr(value)
