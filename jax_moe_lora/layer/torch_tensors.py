"""Tensors of torch as arguments of the layer's functions, taken through DLPack and given back as one; arrays of numpy.

Nothing is copied where torch and jax share the device. torch is not imported here: as long as nobody has, there are no
tensors.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_moe_lora.arguments import INT32, host_array, is_torch
from jax_moe_lora.errors import InputError
from pallas_kernels.backend import default_device


def takes_any_array[**P, R](
    *static: str, gives_torch: bool = True, check: Callable[..., None] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the function takes arrays of numpy, and torch tensors, wherever it takes arrays of jax.

    With tensors it runs as one jitted program. Where its first argument is a tensor, so is the result, on the same
    device. Gradients do not cross from jax to torch: a tensor that requires one is refused, except under
    `torch.no_grad()`.

    Args:
      static: names of the arguments that are no arrays.
      gives_torch: the result is arrays, which become tensors too.
      check: called with the arguments by name before they are traced, to refuse values that a trace cannot see.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        jitted = jax.jit(function, static_argnames=static)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            leaves = jax.tree.leaves((args, kwargs))
            if any(isinstance(leaf, np.ndarray) for leaf in leaves):
                args, kwargs = jax.tree.map(_of_jax, (args, kwargs))
            if "torch" not in sys.modules or not any(map(is_torch, leaves)):
                return function(*args, **kwargs)
            try:
                arguments = signature.bind(*args, **kwargs).arguments
            except TypeError:
                return function(*args, **kwargs)  # which says what is missing or unknown, with its own name
            first = next(iter(arguments.values()))
            arrays = {name: from_torch(name, value) for name, value in arguments.items()}
            if check is not None:
                check(**arrays)
            result = jitted(**arrays)
            if gives_torch and is_torch(first):
                return jax.tree.map(lambda array: to_torch(array, first), result)
            return jax.block_until_ready(result)  # the caller may write into the tensors once this returns

        return call

    return decorate


def from_torch(name: str, values: Any) -> Any:
    """The same pytree with an array of jax for each torch tensor in it.

    Args:
      name: what errors call it.
      values: an array, a tensor, or a pytree of them.

    Raises:
      InputError: a tensor that requires a gradient, or is float64 where jax has none, or that jax cannot take.
    """
    return jax.tree.map(lambda leaf: _array(name, leaf) if is_torch(leaf) else leaf, values)


def to_torch(array: jax.Array, like: Any) -> Any:
    """A torch tensor of an array, on the device of the tensor `like`.

    On a GPU torch's stream waits for the array. On a CPU this call does: the caller may write into the tensors that it
    was computed from.
    """
    torch = sys.modules["torch"]
    if like.device.type == "cpu":
        jax.block_until_ready(array)
    if like.device.type in ("cuda", next(iter(array.devices())).platform):
        return torch.from_dlpack(array).to(like.device)
    on_host = np.asarray(array)
    if on_host.dtype == ml_dtypes.bfloat16:  # which torch does not take from numpy
        return torch.from_numpy(on_host.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(on_host.copy())


def _of_jax(leaf: Any) -> Any:
    """An array of jax for one of numpy, which a traced index cannot read; float64 is left for the checks to refuse."""
    if not isinstance(leaf, np.ndarray):
        return leaf
    if leaf.dtype.kind in "iu" and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        return jnp.asarray(_to_32_bits(leaf))
    return jnp.asarray(leaf) if jax.dtypes.canonicalize_dtype(leaf.dtype) == leaf.dtype else leaf


def _to_32_bits(integers: np.ndarray) -> np.ndarray:
    """Clamped: a cast would wrap around, onto another adapter's slot."""
    return np.clip(integers, max(np.iinfo(integers.dtype).min, -INT32 - 1), INT32).astype(np.int32)


def _array(name: str, tensor: Any) -> jax.Array:
    torch = sys.modules["torch"]
    if tensor.requires_grad and torch.is_grad_enabled():
        raise InputError(
            f"{name} is a torch tensor that requires a gradient, which jax does not give to torch; call under "
            "torch.no_grad(), or give it detached."
        )
    if tensor.dtype == torch.float64 and not jax.config.jax_enable_x64:
        raise InputError(f"{name} is a torch tensor of float64; expected float32, bfloat16 or float16.")
    tensor = tensor.detach()
    if tensor.dtype == torch.int64:  # a cast to 32 bits would wrap around, onto another adapter's slot
        tensor = tensor.clamp(-INT32 - 1, INT32).to(torch.int32)
    on_host = tensor.device.type == "cpu"
    try:
        if on_host and (default_device().platform != "cpu" or not tensor.is_floating_point()):
            # A copy: on the device where arrays of numpy go, and of slots, ids and masks, which callers write into.
            return jnp.array(host_array(tensor))
        return jnp.from_dlpack(tensor.contiguous())
    except (BufferError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        shown = f"{list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
        raise InputError(f"{name} is a torch tensor {shown}, which jax cannot take here: {error}") from error
