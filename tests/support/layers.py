"""Random layers with random adapters, and the figures by which results are compared."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe_lora.adapters.bank import AdapterBank, create_bank
from jax_moe_lora.adapters.insertion import insert
from jax_moe_lora.adapters.lora import LoRAAdapter, LoRAWeights, Site
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.layer import reference
from jax_moe_lora.layer.moe import moe_lora
from jax_moe_lora.nn import moe_sites
from pallas_kernels.routed_experts.weights import ExpertWeights

LAYOUTS = ("per_expert", "fused", "shared_outer", "partial", "with_router")
# Leading axis 1: the side that touches the hidden width is shared by all experts.
SHARED_OUTER = {("gate", "a"), ("up", "a"), ("down", "b")}


@dataclass(frozen=True)
class Spec:
    """A layer's sizes, and the adapters in its slots as (layout, rank)."""

    tokens: int = 37
    hidden: int = 64
    width: int = 48
    experts: int = 8
    top_k: int = 3
    slots: int = 6
    max_rank: int = 48
    adapters: tuple[tuple[str, int], ...] = tuple(zip(LAYOUTS, (4, 16, 40, 8, 17), strict=True))
    dtype: str = "float32"
    seed: int = 0
    as_gpt_oss: bool = False  # biases, and the clamped activation

    @property
    def config(self) -> MoEConfig:
        own = {"activation": "clamped_swiglu", "expert_bias": True} if self.as_gpt_oss else {}
        return MoEConfig(self.hidden, self.width, self.experts, self.top_k, renormalize=True, **own)


@dataclass(frozen=True)
class Problem:
    """One drawn instance: inputs rounded to the spec's dtype, as float32 numpy arrays."""

    spec: Spec
    x: np.ndarray
    router: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    adapters: list[LoRAAdapter]
    slots: np.ndarray
    bank: AdapterBank = field(repr=False)
    biases: dict[str, np.ndarray]

    @property
    def experts(self) -> ExpertWeights:
        biases = {f"{name}_bias": jnp.asarray(bias, self.spec.dtype) for name, bias in self.biases.items()}
        return ExpertWeights(*[jnp.asarray(w, self.spec.dtype) for w in (self.gate, self.up, self.down)], **biases)

    def run(self, slots: np.ndarray | None = None, bank: AdapterBank | None = None, base: bool = False) -> np.ndarray:
        """The layer's output; `base=True` has no bank at all."""
        x, router = (jnp.asarray(w, self.spec.dtype) for w in (self.x, self.router))
        used = None if base else (bank or self.bank).layer(0)
        slots = jnp.asarray(self.slots if slots is None else slots, jnp.int32)
        y = LAYER(x, router, self.experts, self.spec.config, used, slots)
        return np.asarray(y.astype(jnp.float32))

    def expected(self, dtype: type = np.float32) -> np.ndarray:
        """The oracle's output."""
        own = [
            None if not 0 <= s < len(self.adapters) else oracle_adapter(self.adapters[s], self.spec) for s in self.slots
        ]
        weights = (self.x, self.router, self.gate, self.up, self.down)
        options = {"activation": self.spec.config.activation, "biases": self.biases}
        return reference.moe_lora(*weights, own, top_k=self.spec.top_k, renormalize=True, dtype=dtype, **options)


LAYER = jax.jit(moe_lora, static_argnames=("config", "implementation"))


def draw(spec: Spec) -> Problem:
    rng = np.random.default_rng(spec.seed)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return rounded(scale * rng.normal(size=shape), spec.dtype)

    e, d, f = spec.experts, spec.hidden, spec.width
    adapters = [random_adapter(spec, layout, rank, rng) for layout, rank in spec.adapters]
    bank = create_bank(moe_sites(spec.config), spec.slots, spec.max_rank, None, spec.dtype)
    for slot, adapter in enumerate(adapters):
        bank = insert(bank, slot, adapter)
    slots = rng.integers(-1, len(adapters), spec.tokens)
    weights = [normal(e, f, d, scale=d**-0.5), normal(e, f, d, scale=d**-0.5), normal(e, d, f, scale=f**-0.5)]
    x, router = normal(spec.tokens, d), normal(e, d)
    biases = {}
    if spec.as_gpt_oss:  # large enough for the activation to clamp
        biases = {"gate": normal(e, f, scale=5), "up": normal(e, f, scale=5), "down": normal(e, d)}
    return Problem(spec, x, router, *weights, adapters, slots, bank, biases)


def random_adapter(spec: Spec, layout: str, rank: int, rng: np.random.Generator) -> LoRAAdapter:
    sites = moe_sites(spec.config)
    modules = ["gate", "up", "down"] if layout != "partial" else ["up"]
    weights = {(0, m): random_weights(spec, m, sites[m], rank, layout, rng) for m in modules}
    if layout == "fused":
        weights[0, "up"] = replace(weights[0, "up"], a=weights[0, "gate"].a)
    if layout == "with_router":
        weights[0, "router"] = random_weights(spec, "router", sites["router"], rank, layout, rng)
    return LoRAAdapter(f"{layout}-{rank}", weights)


def random_weights(
    spec: Spec, module: str, site: Site, rank: int, layout: str, rng: np.random.Generator
) -> LoRAWeights:
    def lead(side: str) -> int:
        return 1 if layout == "shared_outer" and (module, side) in SHARED_OUTER else site.num_experts

    a = rounded(site.in_width**-0.5 * rng.normal(size=(lead("a"), rank, site.in_width)), spec.dtype)
    b = rounded(rank**-0.5 * rng.normal(size=(lead("b"), site.out_width, rank)), spec.dtype)
    ranks = np.full(site.num_experts, rank, np.int32)
    if layout == "partial":
        ranks[::2] = 0
    return LoRAWeights(a, b, ranks, rng.uniform(0.5, 2, site.num_experts).astype(np.float32))


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 values that `dtype` holds exactly."""
    return np.asarray(jnp.asarray(values, dtype).astype(jnp.float32))


def oracle_adapter(adapter: LoRAAdapter, spec: Spec) -> dict:
    """An adapter as the reference wants it; scales go into B, which is float32 there."""
    out = {}
    for (_, module), w in adapter.weights.items():
        experts = len(w.ranks)
        live = (np.arange(w.a.shape[1]) < w.ranks[:, None])[:, :, None]
        a = np.where(live, np.broadcast_to(w.a, (experts, *w.a.shape[1:])), 0)
        b = np.broadcast_to(w.b, (experts, *w.b.shape[1:])) * w.scale[:, None, None]
        out[module] = (a, b, 1.0)
    return out


def figures(actual: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Largest absolute error, relative Frobenius error, cosine."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    norms = np.linalg.norm(actual) * np.linalg.norm(expected)
    return {
        "max_abs": float(np.abs(actual - expected).max()),
        "relative": float(np.linalg.norm(actual - expected) / np.linalg.norm(expected)),
        "cosine": float((actual * expected).sum() / norms),
    }


def assert_close(actual: np.ndarray, expected: np.ndarray, relative: float) -> None:
    found = figures(actual, expected)
    assert found["relative"] <= relative, f"{found}, at most {relative} relative was expected"  # NaN fails too
