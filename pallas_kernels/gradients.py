"""Ops without a gradient of their own say which function has one."""

from functools import partial
from typing import TypeVar

import jax

from pallas_kernels.errors import NotDifferentiable

T = TypeVar("T")


def no_gradient[T](advice: str, operands: T) -> T:
    """The operands as they are; differentiating by one of them raises.

    Args:
      advice: what the op is called, and which function to differentiate instead.
      operands: a pytree of what the op reads.

    Raises:
      NotDifferentiable: when a gradient or a tangent passes through.
    """
    return _guard(advice, operands)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _guard[T](advice: str, operands: T) -> T:
    del advice
    return operands


def _refuse[T](advice: str, operands: T) -> tuple[T, None]:
    del operands
    raise NotDifferentiable(advice)


def _unreachable[T](advice: str, kept: None, cotangents: T) -> tuple[T]:
    raise NotDifferentiable(advice)


_guard.defvjp(_refuse, _unreachable)
