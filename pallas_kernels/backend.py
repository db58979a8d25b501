"""The backends of the grouped ops as data: what each can run, where its code is, and which one a call gets.

A new backend is one `Backend` in `BACKENDS`, and one file in the folder of each op that it has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.errors import UnsupportedImplementation
from pallas_kernels.quantised.format import Format

Implementation = Literal["hopper", "portable", "xla", "reference"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)
Operand = jax.typing.DTypeLike | Format
"""The dtype of weights or pages, or the format of quantised weights."""
Op = Literal[
    "plan",
    "few_tokens",
    "dispatch",
    "lora_steps",
    "shrink",
    "grouped_matmul",
    "input_gradient",
    "grouped_lora",
    "page_gradients",
    "route",
    "token_heads",
]
WIDTH_MULTIPLE = 64  # one ring stage of the kernels
MAX_WIDTH = 256 * 64  # a row in one TMA box
MAX_SLOTS = 256  # the kernel of LoRA steps unrolls over them
NUM_SMS = 132  # of an H100 SXM, H200: what a program is lowered for where neither a device nor a target says

lowering_sms = jax.make_user_context(None)
"""`with lowering_sms(114): ...` lowers kernels for a GPU of so many SMs, whatever device is here."""


@dataclass(frozen=True)
class Call:
    """What decides whether a backend can run a call.

    Attributes:
      dtype: of the rows.
      operands: dtypes of weights and pages, and the formats of quantised weights.
      widths: of the projection's rows, in and out.
      result: dtype of the result.
      slots: adapter slots.
    """

    dtype: jnp.dtype
    operands: tuple[Operand, ...]
    widths: tuple[int, ...]
    result: jnp.dtype
    slots: int


@dataclass(frozen=True)
class Backend:
    """One way to run the grouped ops.

    Attributes:
      name: what `implementation` calls it.
      why_not: why it cannot run a call; empty where it can.
      ops: op -> the module that has it. `plan` has the row alignment and the rows of a tile too.
      reads: the backends whose plans it can read.
      backward: the backend that runs the backward pass of its layers.
      automatic: it is picked where none is asked for.
      kernels: it is written in kernels; a model that asks for one without keeps attention with XLA too.
      packs_dense: dense projections multiply the pages of all slots at once (`jax_moe_lora.layer.linear`).
    """

    name: Implementation
    why_not: Callable[[Call], str]
    ops: Mapping[Op, str]
    reads: frozenset[str]
    backward: Implementation
    automatic: bool = True
    kernels: bool = True
    packs_dense: bool = False

    def has(self, op: Op) -> bool:
        """Whether the backend has an op of its own."""
        return op in self.ops

    def module(self, op: Op) -> ModuleType:
        """The module that has the op; it is imported when it is used, and Mosaic with it.

        Raises:
          UnsupportedImplementation: the backend has no such op.
        """
        if op not in self.ops:
            able = [name for name, backend in BACKENDS.items() if op in backend.ops]
            raise UnsupportedImplementation(f"{self.name} has no {op}; ask for one of {', '.join(able)}.")
        return import_module(f"pallas_kernels.{self.ops[op]}")

    def for_op(self, op: Op) -> "Backend":
        """This backend, or the one that runs its backward pass where only that one has the op."""
        return self if op in self.ops else BACKENDS[self.backward]


@dataclass(frozen=True)
class Choice[Name: str]:
    """What was picked, and for each other one why it was not.

    Attributes:
      picked: name of the backend that runs the call.
      why_not: each other backend and why it was not picked.
    """

    picked: Name
    why_not: dict[str, str]


def choose(
    implementation: str | None = None,
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    operands: Sequence[Operand] = (),
    widths: Sequence[int] = (),
    result: jax.typing.DTypeLike | None = None,
    slots: int = 0,
) -> Choice[Implementation]:
    """Picks the implementation of the grouped ops; `None` takes the best that runs this call.

    Args:
      implementation: a backend by name, or None.
      dtype: of the rows.
      operands: dtypes of weights and pages, and the formats of quantised weights.
      widths: of the projection's rows, in and out.
      result: dtype of the result, `dtype` where None.
      slots: adapter slots.

    Raises:
      UnsupportedImplementation: for a name that is unknown, or known and not able to run the call.
    """
    rows = jnp.dtype(dtype)
    call = Call(rows, tuple(operands), tuple(widths), jnp.dtype(rows if result is None else result), slots)
    why_not = {name: backend.why_not(call) for name, backend in BACKENDS.items()}
    if implementation is None:
        picked = next(name for name, backend in BACKENDS.items() if backend.automatic and not why_not[name])
        otherwise = f"{picked} is preferred"
    else:
        picked = backend_named(implementation).name
        if why_not[picked]:
            raise UnsupportedImplementation(
                f"implementation={implementation!r} cannot run this: {why_not[picked]}; use 'xla' or None."
            )
        otherwise = "another was asked for"
    reasons: dict[str, str] = {
        name: why_not[name] or (otherwise if backend.automatic else "it is written for reading: ask for it by name")
        for name, backend in BACKENDS.items()
        if name != picked
    }
    return Choice(picked, reasons)


def backend_named(implementation: str) -> Backend:
    """The backend of that name.

    Raises:
      UnsupportedImplementation: there is none.
    """
    if implementation not in BACKENDS:
        raise UnsupportedImplementation(
            f"implementation={implementation!r} is unknown; use one of {IMPLEMENTATIONS} or None."
        )
    return BACKENDS[implementation]


def backend_for_plan(planned: Implementation, implementation: str | None, op: Op | None = None) -> Backend:
    """The backend that was asked for, or the one that a plan was made for.

    Args:
      planned: the plan's backend.
      implementation: the backend that the caller asks for, or None for the plan's.
      op: an op that the backend must have; None for any.

    Raises:
      UnsupportedImplementation: the backend is unknown, cannot read the plan, or lacks the op.
    """
    backend = backend_named(planned if implementation is None else implementation)
    if planned not in backend.reads:
        to_plan = ", or leave the implementation to the plan" if op is None or BACKENDS[planned].has(op) else ""
        raise UnsupportedImplementation(
            f"The plan was made for {planned!r}, which {backend.name!r} cannot read; "
            f"give make_plan implementation={backend.name!r}{to_plan}."
        )
    if op is not None and not backend.has(op):
        raise UnsupportedImplementation(
            f"The plan was made for {planned!r}, and {backend.name!r} has no {op}; {_who_has(op, planned)}."
        )
    return backend


def _who_has(op: Op, planned: Implementation) -> str:
    """What to ask for to have the op run: first the backends that can read the plan, then those that want their own."""
    able = [backend for backend in BACKENDS.values() if backend.has(op)]
    readers = [repr(backend.name) for backend in able if planned in backend.reads]
    others = [repr(backend.name) for backend in able if planned not in backend.reads]
    advice = [f"ask for implementation={' or '.join(readers)}, which can read this plan"] if readers else []
    advice += [f"give make_plan implementation={' or '.join(others)}"] if others else []
    return ", or ".join(advice)


def default_device() -> jax.Device:
    """The device that a call runs on unless it is placed elsewhere."""
    default = jax.config.jax_default_device  # a device, a platform's name, or None
    return jax.devices(default)[0] if default is None or isinstance(default, str) else default


def device_capability() -> tuple[tuple[int, ...] | None, str]:
    """Compute capability of the default device, None where it is no NVIDIA GPU; and what to call it."""
    device = default_device()
    capability = getattr(device, "compute_capability", None)
    if capability is None or not capability.replace(".", "").isdecimal():  # ROCm says gfx942, say
        return None, device.platform
    return tuple(map(int, capability.split("."))), f"compute capability {capability}"


def target_sms() -> int:
    """Blocks of a persistent kernel: the SMs of the target that is named, else of the device, else `NUM_SMS`."""
    named = lowering_sms.value
    return named or getattr(default_device(), "core_count", None) or NUM_SMS


def _why_not_hopper(call: Call) -> str:
    """Empty where the Hopper kernels can run the call."""
    capability, device = device_capability()
    if capability != (9, 0):
        return f"it needs a GPU of compute capability 9.0 (H100, H200), this is {device}"
    if any(width % WIDTH_MULTIPLE or width > MAX_WIDTH for width in call.widths):
        return f"widths must be multiples of {WIDTH_MULTIPLE} up to {MAX_WIDTH}, these are {list(call.widths)}"
    if call.slots > MAX_SLOTS:
        return f"it serves up to {MAX_SLOTS} adapter slots, these are {call.slots}"
    return _why_not_formats(call) or _why_not_dtypes(call)


def _why_not_formats(call: Call) -> str:
    """Empty where the Hopper kernels can unpack the weights."""
    formats = [operand for operand in call.operands if isinstance(operand, Format)]
    if not formats:
        return ""
    if call.dtype != jnp.bfloat16:
        return f"it makes bfloat16 of quantised weights, and the rows are {call.dtype}"
    in_rows = sorted({format.name for format in formats if format.layout != "hopper"})
    if in_rows:
        return f"it reads weights that `pack` has packed for it, these are {', '.join(in_rows)} in rows"
    names = sorted({format.name for format in formats})
    if len(names) > 1:
        return f"it reads one format a layer, these are {', '.join(names)}"
    return ""


def _why_not_portable(call: Call) -> str:
    """Empty where the portable kernels can run the call."""
    capability, device = device_capability()
    if capability is None or capability < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or later, this is {device}"
    if any(width % WIDTH_MULTIPLE for width in call.widths):
        return f"widths must be multiples of {WIDTH_MULTIPLE}, these are {list(call.widths)}"
    formats = sorted({operand.name for operand in call.operands if isinstance(operand, Format)})
    if formats:
        return f"it has no kernels for weights in {', '.join(formats)}, which 'xla' dequantises tile by tile"
    return _why_not_dtypes(call)


def _why_not_dtypes(call: Call) -> str:
    """Empty where the tensor cores can multiply these."""
    if call.dtype not in (jnp.bfloat16, jnp.float16):
        return f"its tensor cores multiply bfloat16 and float16, these are {call.dtype} (float32 would become TF32)"
    dtypes = [operand for operand in call.operands if not isinstance(operand, Format)]
    others = {str(jnp.dtype(dtype)) for dtype in dtypes} - {str(call.dtype)}
    if others:
        return f"rows, weights and pages must have one dtype, these are {call.dtype} and {', '.join(sorted(others))}"
    return "" if call.result == call.dtype else f"it returns {call.dtype}, the call wants {call.result}"


_XLA_PLAN: dict[Op, str] = {"plan": "plan.xla", "dispatch": "dispatch.xla"}
# Outside of the experts; XLA runs them where a backend has none.
_OF_MODELS: dict[Op, str] = {"route": "router.portable", "token_heads": "token_heads.portable"}

# In the order of preference.
BACKENDS: dict[Implementation, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "hopper",
            why_not=_why_not_hopper,
            ops=_OF_MODELS
            | {
                "plan": "plan.hopper",
                "dispatch": "dispatch.hopper",
                "few_tokens": "lora_steps.hopper_few_tokens",
                "lora_steps": "lora_steps.hopper",
                "shrink": "grouped_lora.hopper_shrink",
                "grouped_matmul": "grouped_matmul.hopper",
                "input_gradient": "grouped_matmul.hopper",
                "page_gradients": "grouped_lora.hopper_gradients",
            },
            reads=frozenset({"hopper"}),
            backward="hopper",
            packs_dense=True,
        ),
        Backend(
            "portable",
            why_not=_why_not_portable,
            ops=_OF_MODELS
            | {"plan": "plan.portable", "dispatch": "dispatch.xla", "grouped_matmul": "grouped_matmul.portable"},
            reads=frozenset({"portable"}),
            backward="xla",
        ),
        Backend(
            "xla",
            why_not=lambda call: "",
            ops=_XLA_PLAN
            | {
                "grouped_matmul": "grouped_matmul.xla",
                "input_gradient": "grouped_matmul.xla",
                "grouped_lora": "grouped_lora.xla",
                "page_gradients": "grouped_lora.xla",
            },
            reads=frozenset({"xla", "reference", "portable"}),
            backward="xla",
            kernels=False,
        ),
        Backend(
            "reference",
            why_not=lambda call: "",
            ops=_XLA_PLAN
            | {
                "grouped_matmul": "grouped_matmul.reference",
                "input_gradient": "grouped_matmul.reference",
                "grouped_lora": "grouped_lora.reference",
                "page_gradients": "grouped_lora.reference",
            },
            reads=frozenset(IMPLEMENTATIONS),
            backward="reference",
            automatic=False,
            kernels=False,
        ),
    )
}
