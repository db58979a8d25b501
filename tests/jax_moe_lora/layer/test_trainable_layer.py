"""The layer in a model of one's own: adapters are trained by `nnx.grad` and `nnx.Optimizer`, and the base is not."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jax_moe_lora import InputError, LoRAAdapter, MoEConfig, extract, insert, moe_lora, remove
from jax_moe_lora.adapters.bank import create_bank
from jax_moe_lora.adapters.lora import Site, uniform
from jax_moe_lora.nn import LoRALinear, LoRAParam, LoRATable, MoELoRA, load, moe_sites
from jax_moe_lora.parity import shared_adapter
from jax_moe_lora.training import AdapterSpec, init_params, to_adapter

pytestmark = pytest.mark.optimised

CONFIG = MoEConfig(16, 8, 4, 2)
SITES = moe_sites(CONFIG)
SLOTS = jnp.array([0, 0, 1, 1, -1, 0])


@pytest.fixture(autouse=True)
def _standard_promotion():
    """optax needs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def new_adapter(seed: int, **spec) -> LoRAAdapter:
    """As PEFT makes one: A random, B zero."""
    spec = AdapterSpec(**({"rank": 4, "targets": ("router", "gate", "up", "down")} | spec))
    return to_adapter(init_params(spec, SITES, jax.random.key(seed)), spec, SITES, "new")


def layer_of(*adapters: LoRAAdapter, **options) -> MoELoRA:
    layer = MoELoRA(CONFIG, max_adapters=3, max_rank=16, rngs=nnx.Rngs(0), **options)
    for slot, adapter in enumerate(adapters):
        load(layer, lambda bank, slot=slot, adapter=adapter: insert(bank, slot, adapter))
    return layer


def base_weights(layer: MoELoRA) -> list[np.ndarray]:
    return [*map(np.asarray, jax.tree.leaves(nnx.state(layer, nnx.Param)))]


def rows(count: int = len(SLOTS), seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (count, CONFIG.hidden_size))


def loss(layer: MoELoRA, x: jax.Array, y: jax.Array, slots: jax.Array) -> jax.Array:
    return ((layer(x, slots).astype(jnp.float32) - y) ** 2).mean()


value_and_grad = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, LoRAParam))
grad = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, LoRAParam)))


def test_pages_are_trainable_and_tables_are_another_kind():
    layer = layer_of()
    _, pages, tables, params = nnx.split(layer, LoRAParam, LoRATable, nnx.Param)
    assert {leaf.dtype for leaf in jax.tree.leaves(pages)} == {jnp.dtype("float32")}
    assert {path[:2] for path, _ in nnx.to_flat_state(pages)} == {("adapters", "pages")}
    assert {path[:2] for path, _ in nnx.to_flat_state(tables)} == {
        ("adapters", name) for name in ("owners", "tables", "scales")
    }
    assert {path[0] for path, _ in nnx.to_flat_state(params)} == {"router", "experts"}


@pytest.mark.slow
def test_the_gradient_of_the_module_is_that_of_the_pure_function():
    layer = layer_of(new_adapter(0), shared_adapter(CONFIG, 5))
    x, y = rows(), rows(seed=1)
    bank, weights = layer.adapters.bank, (layer.router.weight[...], layer.experts.weights)

    def pure(pools):
        out = moe_lora(x, *weights, CONFIG, replace(bank, pools=pools).layer(0), SLOTS)
        return ((out - y) ** 2).mean()

    expected = jax.jit(jax.grad(pure))(bank.pools)
    pages = grad(layer, x, y, SLOTS)["adapters"]["pages"]
    for width, pool in zip(bank.widths, expected, strict=True):
        assert pool.any()
        np.testing.assert_allclose(pages[str(width)][...], pool, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_training_learns_each_slots_own_task_and_nothing_else_changes(base):
    """Two adapters learn two targets in one batch; the base, a third adapter and what pads a page keep their bits."""
    teacher = layer_of(*(shared_adapter(CONFIG, 4, seed=seed, scale=1.0) for seed in (1, 2)))
    layer = layer_of(
        new_adapter(0),
        new_adapter(1, layout="shared-outer"),
        shared_adapter(CONFIG, 4),
        param_dtype=base,
        adapter_dtype="float32",
    )
    for name in ("gate", "up", "down"):
        getattr(teacher.experts, name).set_value(getattr(layer.experts, name)[...].astype(jnp.float32))
    teacher.router.weight.set_value(layer.router.weight[...].astype(jnp.float32))
    x, slots = rows(96), jnp.arange(96) % 2
    y = teacher(x, slots)
    optimizer = nnx.Optimizer(layer, optax.adam(0.03), wrt=LoRAParam)

    @nnx.jit
    def step(layer, optimizer):
        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, LoRAParam))(
            layer, x.astype(base), y, slots
        )
        optimizer.update(layer, gradients)
        return value

    params, third = base_weights(layer), extract(layer.adapters.bank, 2, "third")
    losses = [float(step(layer, optimizer)) for _ in range(150)]
    assert losses[-1] < 0.2 * losses[0], losses[::30]
    for before, after in zip(
        *map(jax.tree.leaves, (params, nnx.to_pure_dict(nnx.state(layer, nnx.Param)))), strict=True
    ):
        np.testing.assert_array_equal(before, after)
    for key, weights in extract(layer.adapters.bank, 2, "third").weights.items():
        np.testing.assert_array_equal(weights.a, third.weights[key].a)
        np.testing.assert_array_equal(weights.b, third.weights[key].b)
    assert [pool[0].any() for pool in layer.adapters.bank.pools] == [False] * len(layer.adapters.bank.pools)
    trained = extract(layer.adapters.bank, 1, "trained")
    assert trained.weights[0, "gate"].a.shape[0] == trained.weights[0, "down"].b.shape[0] == 1  # still shared
    fresh = layer_of(trained, param_dtype=base, adapter_dtype="float32")  # an adapter as any other
    only = jnp.zeros(8, jnp.int32)
    np.testing.assert_array_equal(fresh(x[:8].astype(base), only), layer(x[:8].astype(base), only + 1))
    assert not jnp.concatenate([pool[:, 4:].ravel() for pool in layer.adapters.bank.pools]).any()  # ranks 4 to 15


@pytest.mark.slow
def test_a_dense_layer_trains_within_a_model_of_ones_own():
    class Regression(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.first = nnx.Linear(16, 12, rngs=rngs)
            self.second = LoRALinear(12, 3, max_adapters=2, max_rank=16, rngs=rngs)

        def __call__(self, x, slots):
            return self.second(nnx.relu(self.first(x)), slots)

    model = Regression(nnx.Rngs(0))
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(1, 4, 12)).astype(np.float32), np.zeros((1, 3, 4), np.float32)
    load(model.second, lambda bank: insert(bank, 1, LoRAAdapter("new", {(0, "linear"): uniform(a, b, 1.0, 1)})))
    x, y, slots = rows(64), rows(64, seed=1)[:, :3], jnp.ones(64, jnp.int32)
    optimizer = nnx.Optimizer(model, optax.adam(0.02), wrt=LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return ((model(x, slots) - y) ** 2).mean()

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, LoRAParam))(model)
        optimizer.update(model, gradients)
        return value

    before = model.first.kernel[...]
    losses = [float(step(model, optimizer)) for _ in range(100)]
    assert losses[-1] < 0.8 * losses[0], losses[::20]
    np.testing.assert_array_equal(model.first.kernel[...], before)


@pytest.mark.parametrize("transform", [jax.grad, jax.jit, lambda function: jax.jit(jax.grad(function))])
def test_insert_under_a_transform_says_what_to_use(transform):
    bank = create_bank({"gate": Site(8, 8, 1, (0,))}, 1, 16, dtype="float32")
    a, b = jnp.ones((1, 2, 8)), jnp.ones((1, 8, 2))

    def of_matrix(a):
        adapter = LoRAAdapter("mine", {(0, "gate"): uniform(a, b, 1.0, 1)})
        return insert(bank, 0, adapter).pools[0].sum()

    adapter = LoRAAdapter("mine", {(0, "gate"): uniform(a, b, 1.0, 1)})
    changes = {
        "insert": lambda bank: insert(bank, 0, adapter),
        "remove": lambda bank: remove(bank, 0),
    }

    def of_pages(change):
        return lambda pools: change(replace(bank, pools=pools)).pools[0].sum()

    said = "differentiate the bank's pages: the LoRAParam of jax_moe_lora.nn.MoELoRA, or use jax_moe_lora.training"
    with pytest.raises(InputError, match=f"a of LoRA weights is traced by jax's jit or grad.*{said}"):
        transform(of_matrix)(a)
    for change in changes.values():
        with pytest.raises(InputError, match=f"bank is traced by jax's jit or grad.*{said}"):
            transform(of_pages(change))(bank.pools)
