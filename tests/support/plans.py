"""Routing plans for tests: a kernel's beside XLA's."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.ops import make_plan
from pallas_kernels.plan import hopper_few_pairs, hopper_many_pairs


def assert_kernel_makes_the_plan_of_xla(kernel, sizes: tuple[int, int, int, int], monkeypatch) -> None:
    """For random choices, a tenth of them skipped. `kernel`: a module; sizes: tokens, top_k, experts, slots."""
    tokens, top_k, experts, slots = sizes
    rng = np.random.default_rng(0)
    chosen = rng.random((tokens, experts)).argsort(1)[:, :top_k].astype(np.int32)
    chosen[rng.random(chosen.shape) < 0.1] = experts  # skipped
    of_token = jnp.asarray(rng.integers(-1, max(slots, 1), tokens), jnp.int32)
    arguments = (jnp.asarray(chosen), of_token, experts, slots, "hopper")
    for module in (hopper_few_pairs, hopper_many_pairs):
        monkeypatch.setattr(module, "runs", lambda *sizes, module=module: module is kernel)
    found = make_plan(*arguments)
    monkeypatch.setattr(kernel, "runs", lambda *sizes: False)
    assert_same_plan(found, make_plan(*arguments))


def assert_same_plan(found, expected):
    for name in ("order", "position", "token", "group_sizes", "group_starts", "segment_sizes"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    length = expected.segment_sizes.size + 1
    assert found.before.size >= length + 63
    np.testing.assert_array_equal(found.before[:length], expected.before[:length])
    count = int(expected.tiles.count)
    assert int(found.tiles.count[0]) == count
    assert not np.asarray(found.tiles.rows)[count:].any()
    for name in ("expert", "start", "rows"):
        np.testing.assert_array_equal(
            np.asarray(getattr(found.tiles, name))[:count], np.asarray(getattr(expected.tiles, name))[:count], name
        )
