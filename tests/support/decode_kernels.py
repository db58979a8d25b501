"""The kernels of a decode step outside of the experts: definitions in float64, and what they are compiled with."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.router.portable import route
from pallas_kernels.token_heads.norm import HeadNorm
from pallas_kernels.token_heads.portable import token_heads

ERROR = {"bfloat16": 5e-3, "float16": 6e-4}  # relative, of rounded heads


@dataclass(frozen=True)
class Router:
    """How experts are chosen; `pallas_kernels.router.api.Router` has what the fields mean."""

    router: str
    num_experts: int
    top_k: int
    renormalize: bool = True
    renormalize_eps: float = 1e-20
    renormalize_floor: float = 0.0
    scaling: float = 2.5
    num_groups: int = 1
    top_groups: int = 1


def assert_routes_by_definition(router: Router, tokens: int) -> None:
    """The kernel's experts are those of the definition, and their weights too but for float32's rounding."""
    rng = np.random.default_rng()
    # Tenths: many scores of a token are equal.
    scores = rng.integers(-20, 20, (tokens, router.num_experts)).astype(np.float32) / 10
    bias = rng.integers(-5, 5, router.num_experts).astype(np.float32)
    choice_bias = router.router.endswith("_bias")
    given = bias if choice_bias or router.router == "topk_softmax" else np.zeros_like(bias)
    call = jax.jit(lambda scores, bias: route(scores, bias, choice_bias, router))
    weights, experts = call(jnp.asarray(scores), jnp.asarray(given) if given.any() else None)
    expected, expected_experts = routed(scores, given, choice_bias, router)
    np.testing.assert_array_equal(experts, expected_experts)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


def routed(scores: np.ndarray, bias: np.ndarray, choice_bias: bool, router: Router) -> tuple[np.ndarray, np.ndarray]:
    """Weights and experts by definition."""
    scores = scores.astype(np.float64) + (0 if choice_bias else bias)
    shares = np.exp(scores - scores.max(1, keepdims=True))
    values = {"sigmoid_bias": 1 / (1 + np.exp(-scores)), "topk_softmax": scores}.get(
        router.router, shares / shares.sum(1, keepdims=True)
    )
    # Values are compared in float32, where several may be one: the lower expert is the first.
    for_choice = values.astype(np.float32) + (bias if choice_bias else 0)
    experts = np.argsort(-for_choice, axis=1, kind="stable")[:, : router.top_k]
    weights = np.take_along_axis(values, experts, axis=1)
    if router.router == "topk_softmax":
        weights = np.exp(weights) / np.exp(weights).sum(1, keepdims=True)
    if router.renormalize:
        total = weights.sum(1, keepdims=True) + router.renormalize_eps
        weights = weights / np.maximum(total, router.renormalize_floor)
    return weights * router.scaling, experts


@dataclass(frozen=True)
class Heads:
    """A step's heads. `form`: of the norm, None for none."""

    batch: int
    num_heads: int
    num_kv_heads: int
    width: int
    places: int
    dtype: str = "bfloat16"
    form: dict[str, bool] | None = None


def draw_heads(heads: Heads) -> tuple[Any, ...]:
    """Random operands of the kernel; the second request is full."""
    rng = np.random.default_rng()
    rows = rng.normal(size=(heads.batch, (heads.num_heads + 2 * heads.num_kv_heads) * heads.width))
    weights = [jnp.asarray(1 + 0.1 * rng.normal(size=heads.width), heads.dtype) for _ in range(2)]
    norm = None if heads.form is None else HeadNorm(*weights, 1e-6, **heads.form)
    shape = heads.batch, heads.places, heads.num_kv_heads, heads.width
    keys, values = (jnp.asarray(rng.normal(size=shape), heads.dtype) for _ in range(2))
    place = rng.integers(0, heads.places, heads.batch)
    place[1:2] = heads.places
    angle = rng.uniform(0, 50, (heads.batch, heads.width // 2))
    angles = jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)
    return jnp.asarray(rows, jnp.float32), norm, angles, jnp.asarray(place, jnp.int32), keys, values


def assert_heads_by_definition(heads: Heads) -> None:
    """Queries, and the new keys and values are those of the definition; the rest of the cache keeps its bits."""
    operands = draw_heads(heads)
    _, _, _, place, *caches = operands
    found = jax.jit(token_heads)(*operands)
    queries, *new = turned(heads, *operands[:3])
    stored = np.flatnonzero(np.asarray(place) < heads.places)
    at = stored, np.asarray(place)[stored]
    assert_near(found[0], queries, heads.dtype)
    for result, cache, wanted in zip(found[1:], caches, new, strict=True):
        result, rest = np.asarray(result), np.array(cache)
        if stored.size:
            assert_near(result[at], wanted[stored], heads.dtype)
        rest[at] = result[at]
        np.testing.assert_array_equal(result, rest)


def assert_near(found: Any, wanted: np.ndarray, dtype: str) -> None:
    error = np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)
    assert error < ERROR[dtype], f"relative error {error:.2e}"


def turned(heads: Heads, rows: Any, norm: HeadNorm | None, angles: Any) -> list[np.ndarray]:
    """Queries, keys and values `[B, heads, hd]` by definition."""
    rows = np.asarray(rows.astype(heads.dtype), np.float64).reshape(heads.batch, -1, heads.width)
    ends = heads.num_heads, heads.num_heads + heads.num_kv_heads
    *parts, values = np.split(rows, ends, axis=1)
    cosine, sine = (np.asarray(part, np.float64)[:, None] for part in angles)
    results = []
    for part, weight in zip(parts, (None, None) if norm is None else (norm.q, norm.k), strict=True):
        if norm is not None:
            factor = np.asarray(weight, np.float64) + norm.offset
            part = part / np.sqrt(np.mean(part**2, axis=-1, keepdims=True) + norm.eps) * factor
        first, second = np.split(part, 2, axis=-1)
        results.append(np.concatenate((first * cosine - second * sine, second * cosine + first * sine), axis=-1))
    return [*results, values]


def array(shape: tuple[int, ...], dtype: str = "int32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def decode_cases():
    """What a decode step does outside of the experts."""
    for experts, top_k, kind, bias in ((128, 8, "softmax_topk", False), (512, 10, "sigmoid_bias", True)):
        router = Router(kind, experts, top_k)
        values = array((experts,), "float32") if bias else None
        yield (
            f"route {experts}",
            lambda scores, bias, router=router: route(scores, bias, router.router == "sigmoid_bias", router),
            (array((30, experts), "float32"), values),
        )
    for heads, groups, width, dtype in ((32, 4, 128, "bfloat16"), (64, 8, 64, "float16"), (16, 8, 256, "bfloat16")):
        cache, weight = array((8, 1024, groups, width), dtype), array((width,), dtype)
        angles = (array((8, width // 2), "float32"),) * 2
        rows = array((8, (heads + 2 * groups) * width), "float32")
        yield (
            f"token heads of {width}",
            lambda rows, q, k, *others: token_heads(rows, HeadNorm(q, k, 1e-6), *others),
            (rows, weight, weight, angles, array((8,)), cache, cache),
        )
