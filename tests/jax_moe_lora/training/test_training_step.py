"""A training step: what moves and what does not, mixed equals solo, accumulation, clipping, dtypes."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_moe_lora import InputError
from jax_moe_lora.training import Batch, TrainState, make_evaluation, make_step
from support.layers import assert_close
from support.trained import CONFIG, SPECS, arrays, new_params, same_bits, shallow, state_of, task_batch

pytestmark = pytest.mark.optimised

NAMES = list(SPECS)
# Each has all that could move an absent adapter: momentum, weight decay, a schedule.
OPTIMIZERS = {
    "upper": optax.adamw(optax.cosine_decay_schedule(5e-3, 30), weight_decay=0.1),
    "reverse": optax.chain(
        optax.add_decayed_weights(0.01), optax.sgd(optax.linear_schedule(0.02, 0.2, 15), momentum=0.9)
    ),
    "sort": optax.adam(1e-2, b1=0.8),
}
DESCENT = dict.fromkeys(SPECS, optax.sgd(1.0))
SHALLOW = shallow()
CLIPS = {"upper": 1e-2, "sort": 1e9}


@pytest.fixture(scope="module")
def step():
    return make_step(SHALLOW[0], SPECS, OPTIMIZERS, clip={"upper": 0.5}, router_loss=0.01)


@cache
def descent(clipped: bool = False, micro_batches: int = 1):
    """A step of plain gradient descent on the model's first layer."""
    return make_step(SHALLOW[0], SPECS, DESCENT, clip=CLIPS if clipped else None, micro_batches=micro_batches)


def gradients_of(batch: Batch, params=None, weights=None, **options):
    """Gradients by adapter, out of one step of descent, and the step's metrics."""
    params = new_params(trained=True, config=SHALLOW[0]) if params is None else params
    now, metrics = descent(**options)(state_of(params, DESCENT), SHALLOW[1] if weights is None else weights, batch)
    return jax.tree.map(jnp.subtract, params, now.params), metrics


def state() -> TrainState:
    return state_of(new_params(config=SHALLOW[0]), OPTIMIZERS)


def only(batch: Batch, slot: int) -> Batch:
    """The same shapes, with every other slot's examples masked."""
    return replace(batch, segments=jnp.where(batch.slots == slot, batch.segments, 0))


def of(state: TrainState, name: str):
    return state.params[name], state.optimizer_states[name], state.updates[name]


@pytest.mark.slow
def test_an_adapter_without_a_token_to_learn_keeps_every_bit(step):
    now, _ = step(state(), SHALLOW[1], task_batch(NAMES, 0, 6))
    before = jax.tree.map(np.asarray, now)
    batch = task_batch(["upper", "reverse", "sort"], 1, 6)
    # `sort` is in the batch, but has nothing to learn in it; `reverse` is padding.
    batch = replace(
        batch,
        weights=jnp.where(batch.slots == NAMES.index("sort"), 0.0, batch.weights),
        segments=jnp.where(batch.slots == NAMES.index("reverse"), 0, batch.segments),
    )
    after, metrics = step(now, SHALLOW[1], batch)
    assert metrics.updated.tolist() == [True, False, False]
    for name in ("reverse", "sort"):
        assert same_bits(of(after, name), of(before, name)), name
    assert not any(
        np.array_equal(*pair)
        for pair in zip(arrays(after.params["upper"]), arrays(before.params["upper"]), strict=True)
    )
    assert int(after.updates["upper"]) == 2
    assert int(after.updates["sort"]) == 1


@pytest.mark.slow
def test_three_adapters_in_one_run_equal_three_solo_runs(step):
    def batch(index: int) -> Batch:
        """Some adapters miss some batches."""
        return task_batch([None if index % 5 == place else name for place, name in enumerate(NAMES)], index, 6)

    def run(slot: int | None) -> tuple[TrainState, list[np.ndarray]]:
        now, losses = state(), []
        for index in range(20):
            rows = batch(index)
            now, metrics = step(now, SHALLOW[1], rows if slot is None else only(rows, slot))
            losses.append(np.asarray(metrics.losses.loss))
        return now, losses

    mixed, mixed_losses = run(None)
    for slot, name in enumerate(NAMES):
        solo, losses = run(slot)
        assert same_bits(of(solo, name), of(mixed, name)), name
        for before, after in zip(arrays(state().params[name]), arrays(mixed.params[name]), strict=True):
            assert np.linalg.norm(after - before) > 1e-2 * np.linalg.norm(after), f"{name} learnt nothing"
        assert int(solo.updates[name]) == int(mixed.updates[name]) == 16
        np.testing.assert_allclose([l[slot] for l in losses], [l[slot] for l in mixed_losses], rtol=1e-5, atol=1e-7)
        for other in set(NAMES) - {name}:
            assert same_bits(of(solo, other), of(state(), other)), f"{other} moved in the run of {name} alone"


@pytest.mark.slow
def test_batches_of_one_shape_run_one_program_and_take_the_state(step):
    given = state()
    now, _ = step(given, SHALLOW[1], task_batch(NAMES, 0, 6))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    compiled = step._cache_size()
    for seed, names in enumerate(([None, "sort"], ["upper"], NAMES, [None])):
        now, _ = step(now, SHALLOW[1], task_batch(names, seed, 6))
    assert step._cache_size() == compiled == 1


@pytest.mark.slow
def test_the_loss_is_the_mean_over_an_adapter_s_own_tokens():
    batch, params = task_batch([*NAMES, None], 3, 8), new_params(trained=True, config=SHALLOW[0])
    evaluate = make_evaluation(SHALLOW[0], SPECS)
    losses = evaluate(params, SHALLOW[1], batch)
    for slot in range(len(NAMES)):
        rows = np.flatnonzero(np.asarray(batch.slots)[:, 0] == slot)
        alone = [evaluate(params, SHALLOW[1], part_of(batch, np.arange(8) == row)) for row in rows]
        weights = np.array([part.weight[slot] for part in alone])
        assert len({*weights}) > 1, "rows of one length prove nothing"
        expected = np.average([part.loss[slot] for part in alone], weights=weights)
        np.testing.assert_allclose(losses.loss[slot], expected, rtol=1e-5)
        assert losses.weight[slot] == weights.sum()
        assert all(part.loss.at[slot].set(0).sum() == 0 for part in alone)


def part_of(batch: Batch, rows: np.ndarray) -> Batch:
    """The same shapes, with every other row masked."""
    return replace(batch, segments=jnp.where(rows[:, None], batch.segments, 0))


@pytest.mark.slow
def test_micro_batches_give_the_gradient_of_the_whole_mean():
    batch = task_batch(NAMES, 5, 6)
    # `sort` has almost all of its tokens in the second part: its mean of means is another.
    few = (jnp.arange(6) < 3)[:, None] & (batch.slots == NAMES.index("sort")) & (jnp.cumsum(batch.weights, 1) > 1)
    batch = replace(batch, weights=jnp.where(few, 0.0, batch.weights))
    whole, metrics = gradients_of(batch)
    parts, part_metrics = gradients_of(batch, micro_batches=2)
    for name in NAMES:
        for key in whole[name]:
            assert_close(np.asarray(parts[name][key]), np.asarray(whole[name][key]), 1e-5)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5), part_metrics, metrics)
    halves = [gradients_of(part_of(batch, (np.arange(6) < 3) == first))[0] for first in (True, False)]
    of_means = jax.tree.map(lambda one, other: (one + other) / 2, *halves)["sort"]["0.down.a"]
    assert np.linalg.norm(of_means - whole["sort"]["0.down.a"]) > 0.02 * np.linalg.norm(of_means)
    with pytest.raises(InputError, match="A batch has 5 rows, which 2 micro_batches do not divide"):
        gradients_of(jax.tree.map(lambda values: values[:5], batch), micro_batches=2)


@pytest.mark.slow
def test_each_adapter_is_clipped_by_its_own_norm():
    batch = task_batch(NAMES, 6, 6)
    free, metrics = gradients_of(batch)
    clipped, clipped_metrics = gradients_of(batch, clipped=True)
    norms = {name: float(optax.tree.norm(free[name])) for name in NAMES}
    np.testing.assert_allclose([*norms.values()], metrics.gradient_norm, rtol=1e-4)
    np.testing.assert_allclose(clipped_metrics.gradient_norm, metrics.gradient_norm, rtol=1e-5)
    for name, own in clipped.items():
        factor = 1e-2 / norms[name] if name == "upper" else 1.0
        for key, gradient in own.items():
            np.testing.assert_allclose(gradient, factor * free[name][key], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_padding_and_rows_of_nobody_change_nothing():
    batch = task_batch([*NAMES, None], 7, 6)
    expected, _ = gradients_of(batch)
    padding = batch.segments == 0
    odd = replace(
        batch,
        tokens=jnp.where(padding, 50, batch.tokens),
        slots=jnp.where(padding, 1, batch.slots),
        weights=jnp.where(padding, 1.0, batch.weights),
        targets=jnp.where(padding, 3, batch.targets),
    )
    stranger = (jnp.arange(6) == 3)[:, None]  # a row of no adapter, as a real example
    odd = replace(odd, segments=jnp.where(stranger, 1, odd.segments), slots=jnp.where(stranger, 99, odd.slots))
    found, metrics = gradients_of(odd)
    for one, other in zip(arrays(expected), arrays(found), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    assert metrics.losses.weight.sum() == batch.weights.sum()


@pytest.mark.slow
def test_an_adapter_that_has_diverged_stays_alone():
    batch, params = task_batch(NAMES, 8, 6), new_params(trained=True, config=SHALLOW[0])
    expected, _ = gradients_of(batch, params)
    lost = params | {"upper": jax.tree.map(lambda values: jnp.full_like(values, jnp.nan), params["upper"])}
    found, _ = gradients_of(batch, lost)
    assert all(np.isnan(leaf).all() for leaf in arrays(found["upper"]))
    for name in ("reverse", "sort"):
        assert same_bits(found[name], expected[name]), name


@pytest.mark.slow
def test_half_precision_weights_train_float32_adapters():
    batch = task_batch(NAMES, 9, 6)
    expected, wide = gradients_of(batch)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), SHALLOW[1])
    found, metrics = gradients_of(batch, weights=half)
    assert {leaf.dtype for leaf in arrays(found)} == {np.dtype(np.float32)}
    assert metrics.losses.loss.dtype == np.float32
    np.testing.assert_allclose(metrics.losses.loss, wide.losses.loss, rtol=2e-2)
    for name in NAMES:
        one, other = (np.concatenate([leaf.ravel() for leaf in arrays(tree[name])]) for tree in (found, expected))
        assert_close(one, other, 0.1)
        # Float32 all the way: not the few values that bfloat16 has.
        assert len(np.unique(one)) > 0.5 * np.count_nonzero(one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batches": 0}, "micro_batches is 0; expected 1 to"),
        ({"router_loss": -0.1}, "router_loss is -0.1; expected zero or more"),
        ({"clip": 0.0}, "clip is 0.0; expected a number above zero"),
        ({"clip": {"lower": 1.0}}, "clip is for 'lower'; expected some of 'upper', 'reverse', 'sort'"),
        ({"optimizers": {"upper": optax.sgd(1)}}, "optimizers are for 'upper'; expected one for each of 'upper', 'rev"),
        ({"specs": {}, "optimizers": {}}, "specs are empty"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    arguments = {"specs": SPECS, "optimizers": OPTIMIZERS} | options
    with pytest.raises(InputError, match=message):
        make_step(CONFIG, **arguments)
