"""The routed layers of other libraries, timed on the same problems: what a user would write with each today.

Each gets the weights in the layout that suits it best, with gate and up side by side, and sorts, gathers and combines
as its own documentation does. `ragged_dot` and `tokamax` run in the same jitted programs as this library; torch runs
from CUDA graphs (`loop`) and eagerly (`queue`). None of them takes several adapters in a batch; PEFT takes one.
"""

import importlib.util
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jax_moe_lora.benchmark.layer import (
    LAYERS_A_CALL,
    MeasureRow,
    Method,
    ResultRow,
    compile_layer,
    figures,
    shifted,
    timings,
)
from jax_moe_lora.benchmark.oracle import relative_error
from jax_moe_lora.benchmark.problem import Problem
from jax_moe_lora.errors import InputError
from pallas_kernels.ops import RANK_PAGE
from pallas_kernels.quantised.api import dense
from pallas_kernels.routed_experts.weights import ExpertWeights
from pallas_kernels.specs import ADAPTERS


class LastLayout:
    """The weights of the last problem in another layout, made once for all its cells. Safe to use from threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: tuple[ExpertWeights, Any] | None = None

    def get(self, experts: ExpertWeights, make: Callable[[ExpertWeights], Any]) -> Any:
        """`make(experts)`, kept until other weights are given."""
        with self._lock:
            if self._last is None or self._last[0] is not experts:
                self._last = None  # frees its memory before the next is made
                self._last = experts, make(experts)
            return self._last[1]


@dataclass(frozen=True)
class RaggedDot:
    """A layer in jax: a grouped matmul between a sort and its inverse.

    Attributes:
      name: the engine's name in results.
      dot: `f(rows [P, in], weights [E, in, out], group_sizes [E]) -> [P, out]`.
      packages: the packages that it needs.
      layout: the weights as `[E, in, out]`.
    """

    name: str
    dot: Callable[[Array, Array, Array], Array]
    packages: tuple[str, ...] = ()
    layout: LastLayout = field(default_factory=LastLayout)

    def why_not(self, adapters: str) -> str:
        return "it takes no adapters" if ADAPTERS[adapters].slots else ""

    def prepare(self, problem: Problem, method: Method) -> MeasureRow:
        experts = self.layout.get(problem.experts, _in_by_out)
        return compile_layer(problem, lambda *arguments: self._layer(*arguments), method, experts)

    def _layer(self, x, weights, chosen, slots, experts, adapters):
        gate_up, down = experts
        top_k = chosen.shape[1]
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        sizes = jnp.bincount(chosen.reshape(-1), length=gate_up.shape[0]).astype(jnp.int32)
        gate, up = jnp.split(self.dot(x[order // top_k], gate_up, sizes), 2, axis=1)
        rows = self.dot(jax.nn.silu(gate) * up, down, sizes)
        back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
        each = rows[back].reshape(*chosen.shape, -1).astype(jnp.float32)
        return (each * weights[..., None]).sum(1).astype(x.dtype)


@jax.jit
def _in_by_out(experts: ExpertWeights) -> tuple[Array, Array]:
    gate, up, down = (dense(weight, jnp.bfloat16) for weight in (experts.gate, experts.up, experts.down))
    return jnp.concatenate([gate, up], 1).swapaxes(1, 2), down.swapaxes(1, 2)


@dataclass(frozen=True)
class TorchLayer:
    """A layer in torch.

    Attributes:
      name: the engine's name in results.
      build: `f(gate_up [E, 2F, D], down [E, D, F], problem) -> layer`, where `layer(x, chosen, weights)` returns y.
      packages: the packages that it needs.
      most_slots: the most adapters that it takes.
      layout: the weights as torch tensors.
    """

    name: str
    build: Callable[[Any, Any, Problem], Callable[..., Any]]
    packages: tuple[str, ...]
    most_slots: int = 0
    layout: LastLayout = field(default_factory=LastLayout)

    def why_not(self, adapters: str) -> str:
        if ADAPTERS[adapters].slots <= self.most_slots:
            return ""
        return "it serves one adapter at a time" if self.most_slots else "it takes no adapters"

    def prepare(self, problem: Problem, method: Method) -> MeasureRow:
        return lambda repeats: self._measure(problem, method, repeats)

    def _measure(self, problem: Problem, method: Method, repeats: int) -> ResultRow:
        import torch

        gate_up, down = self.layout.get(problem.experts, _torch_experts)
        layer = self.build(gate_up, down, problem)
        x, weights = to_torch(problem.x), to_torch(problem.weights)
        ids = [shifted(problem.chosen, i, problem.config.num_experts) for i in range(LAYERS_A_CALL)]
        chosen = [to_torch(each).long() for each in ids]

        def layers() -> None:
            for each in chosen:
                layer(x, each, weights)

        def wait(_: Any) -> None:
            if x.is_cuda:
                torch.cuda.synchronize()

        with torch.no_grad():
            y = layer(x, chosen[0], weights)
            error = relative_error(jnp.asarray(y.float().cpu().numpy()), problem)
            calls, notes = {"queue": layers}, {}
            if method != "queue" and x.is_cuda:
                try:
                    calls["loop"] = _graph(layers)
                except RuntimeError as failed:  # it waits for the device somewhere; the eager figures are still useful
                    notes["note"] = f"no CUDA graph: {' '.join(str(failed).split())[:200]}"
            if method == "loop" and "loop" in calls:
                del calls["queue"]
            timed = {name: timings(call, wait, repeats) for name, call in calls.items()}
            return figures(problem, timed, error) | notes


def _graph(layers: Callable[[], None]) -> Callable[[], None]:
    """The layers as one CUDA graph: the time that torch takes without Python's overhead."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # first runs allocate, which a capture must not
        layers()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers()
    return graph.replay


def to_torch(array: Array) -> Any:
    """A torch tensor that shares the array's memory."""
    import torch

    return torch.from_dlpack(jax.block_until_ready(array))


def _torch_experts(experts: ExpertWeights) -> tuple[Any, Any]:
    import torch

    gate, up, down = (to_torch(dense(w, jnp.bfloat16)) for w in (experts.gate, experts.up, experts.down))
    return torch.cat([gate, up], 1), down


def grouped_mm(gate_up: Any, down: Any, problem: Problem) -> Callable[..., Any]:
    """A layer with `torch.nn.functional.grouped_mm` between a sort and its inverse."""
    import torch

    dot = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    first, second = gate_up.transpose(1, 2), down.transpose(1, 2)

    def layer(x, chosen, weights):
        ids, order = chosen.reshape(-1).sort()
        bounds = torch.arange(first.shape[0], device=x.device)
        ends = torch.searchsorted(ids, bounds, right=True, out_int32=True)
        gate, up = dot(x[order // chosen.shape[1]], first, offs=ends).chunk(2, -1)
        rows = dot(torch.nn.functional.silu(gate) * up, second, offs=ends)
        each = torch.empty_like(rows)
        each[order] = rows
        return (each.view(*chosen.shape, -1).float() * weights[..., None]).sum(1).to(x.dtype)

    return layer


def transformers_peft(gate_up: Any, down: Any, problem: Problem) -> Callable[..., Any]:
    """transformers' experts with `grouped_mm`, and the problem's adapter through PEFT's `target_parameters`."""
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    size = problem.config
    config = Qwen3MoeConfig(
        hidden_size=size.hidden_size, moe_intermediate_size=size.expert_width, num_experts=size.num_experts
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):  # its own weights are never allocated
        block = torch.nn.ModuleDict({"experts": Qwen3MoeExperts(config)})
    block["experts"].gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
    block["experts"].down_proj = torch.nn.Parameter(down, requires_grad=False)
    if problem.adapters is not None:
        _add_peft(block, problem)
    return lambda x, chosen, weights: block["experts"](x, chosen, weights)


def _add_peft(block: Any, problem: Problem) -> None:
    """Adds slot 0 as a PEFT adapter, in which gate and up share one A: the rows of both."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora.layer import ParamWrapper

    (gate_a, gate_b), (up_a, up_b), of_down = (_matrices(problem, module) for module in ("gate", "up", "down"))
    zero = torch.zeros_like(gate_b)
    factors = {
        "gate_up_proj": (
            torch.cat([gate_a, up_a], 1),
            torch.cat([torch.cat([gate_b, zero], 2), torch.cat([zero, up_b], 2)], 1),
        ),
        "down_proj": of_down,
    }
    assert problem.adapters is not None
    scale: Any = float(problem.adapters.scales["gate"][0, 0])
    # PEFT's scale is alpha / r; the ranks, which differ, are those of the weights that are put in.
    targets = [f"experts.{name}" for name in factors]
    inject_adapter_in_model(LoraConfig(r=1, lora_alpha=scale, target_modules=[], target_parameters=targets), block)
    for wrapper in [module for module in block.modules() if isinstance(module, ParamWrapper)]:
        a, b = factors[wrapper.parameter_name]
        wrapper.lora_A["default"].weight.data = a.reshape(-1, a.shape[2])
        wrapper.lora_B["default"].weight.data = b.permute(1, 2, 0).reshape(b.shape[1], -1)  # experts fastest


def _matrices(problem: Problem, module: str) -> tuple[Any, Any]:
    """A `[E, R, in]` and B `[E, out, R]` of slot 0."""
    assert problem.adapters is not None
    pages = problem.adapters[module]
    table = np.asarray(pages.table[0])
    count, experts = int(table[0, 2]), table.shape[0]

    def side(pool: Array, column: int) -> Array:
        pages_of = table[:, column, None] + np.arange(count)
        return pool[pages_of].reshape(experts, count * RANK_PAGE, -1)

    return to_torch(side(pages.a, 0)), to_torch(side(pages.b, 1).swapaxes(1, 2))


def _tokamax_dot(rows: Array, weights: Array, sizes: Array) -> Array:
    import tokamax

    return tokamax.ragged_dot(rows, weights, sizes)


PEERS: dict[str, RaggedDot | TorchLayer] = {
    "ragged_dot": RaggedDot("jax.lax.ragged_dot", lax.ragged_dot),
    "tokamax": RaggedDot("tokamax", _tokamax_dot, ("tokamax",)),
    "torch_grouped_mm": TorchLayer("torch-grouped_mm", grouped_mm, ("torch",)),
    "transformers_peft": TorchLayer(
        "transformers-grouped_mm", transformers_peft, ("torch", "transformers", "peft"), most_slots=1
    ),
}


def find_peers(names: list[str], adapters: list[str], log: Callable[[str], Any]) -> list[RaggedDot | TorchLayer]:
    """The peers that can run here.

    Args:
      names: peers in `PEERS`.
      adapters: the sets of adapters that will be timed.
      log: is given a sentence about each peer that cannot run, or cannot run with a set of adapters.

    Returns:
      The peers.

    Raises:
      InputError: no peer has this name.
    """
    peers = []
    for name in names:
        if name not in PEERS:
            raise InputError(f"--peer is {name!r}; expected one of {', '.join(PEERS)}.")
        peer = PEERS[name]
        missing = [package for package in peer.packages if importlib.util.find_spec(package) is None]
        if missing:
            log(f"{name} is left out: {', '.join(missing)} is not installed.")
        elif "torch" in peer.packages and jax.default_backend() == "gpu" and not _torch_has_gpu():
            log(f"{name} is left out: this torch has no CUDA device.")
        else:
            peers.append(peer)
            for some in adapters:
                if some in ADAPTERS and (why := peer.why_not(some)):
                    log(f"{name} is left out of the cells with {some}: {why}.")
    return peers


def _torch_has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
