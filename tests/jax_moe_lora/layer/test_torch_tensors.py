"""The layer takes torch tensors wherever it takes arrays, and gives a tensor back."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_moe_lora import MoEConfig, create_bank, insert
from jax_moe_lora.adapters.lora import LoRAAdapter, LoRAWeights, uniform
from jax_moe_lora.adapters.packing import pack
from jax_moe_lora.errors import InputError
from jax_moe_lora.inspect import difference
from jax_moe_lora.layer import checks
from jax_moe_lora.layer.linear import dense_plan, lora_linear
from jax_moe_lora.layer.moe import moe_lora, routed_experts, router_scores
from jax_moe_lora.layer.routing import route
from jax_moe_lora.nn import LoRALinear, MoELoRA, RoutedExperts, Router, load, moe_sites
from jax_moe_lora.parity import per_expert_adapter
from jax_moe_lora.training import from_adapter
from pallas_kernels.routed_experts.weights import ExpertWeights
from support.unchecked import annotations_unchecked

pytestmark = [pytest.mark.parity, pytest.mark.optimised]
T, D, F, E, K = 6, 64, 128, 4, 2  # widths that the kernels take too
CONFIG = MoEConfig(D, F, E, K)
DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module", autouse=True)
def _with_torch() -> None:
    """Its import takes seconds: collecting the tests costs none."""
    global torch
    torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def _as_users_run_it() -> Iterator[None]:
    """The annotations of functions speak of jax alone."""
    with annotations_unchecked():
        yield


def inputs(dtype: str = "float32"):
    """Tensors: x, router, experts and slots."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int):
        return torch.randn(*shape, generator=generator).to(getattr(torch, dtype))

    experts = ExpertWeights(normal(E, F, D), normal(E, F, D), normal(E, D, F))
    return normal(T, D), normal(E, D), experts, torch.tensor([0, -1, 0, 1, -1, 0])


def as_jax(tree):
    """The same numbers as arrays of jax, by way of numpy in float32."""

    def array(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        values = jnp.asarray(leaf.float().numpy() if leaf.is_floating_point() else leaf.numpy())
        return values.astype(str(leaf.dtype).removeprefix("torch.")) if leaf.is_floating_point() else values

    return jax.tree.map(array, tree)


def same(tensor, array) -> None:
    assert isinstance(tensor, torch.Tensor)
    assert str(tensor.dtype) == f"torch.{array.dtype}"
    np.testing.assert_array_equal(tensor.float().numpy(), np.asarray(array.astype(jnp.float32)))


def bank(dtype: str = "float32"):
    empty = create_bank(moe_sites(CONFIG), 2, 16, None, dtype)
    return insert(empty, 0, per_expert_adapter(CONFIG, 5)).layer(0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layer_called_on_tensors_gives_the_tensor_of_the_same_bits(dtype):
    x, router, experts, slots = inputs(dtype)
    pages, layer = bank(dtype), jax.jit(moe_lora, static_argnums=3)
    y = moe_lora(x, router, experts, CONFIG, pages, slots)
    same(y, layer(*as_jax((x, router, experts)), CONFIG, pages, as_jax(slots)))
    assert (y.float()[0] != moe_lora(x, router, experts, CONFIG).float()[0]).any()


def test_every_function_of_the_layer_takes_tensors():
    x, router, experts, slots = inputs()
    pages, (weights, chosen) = bank(), route(router_scores(inputs()[0], router), CONFIG)
    same(weights, jax.jit(route, static_argnums=1)(router_scores(*as_jax((x, router))), CONFIG)[0])
    y = routed_experts(x, weights, chosen, experts, CONFIG, pages, slots)
    same(
        y,
        jax.jit(routed_experts, static_argnums=4)(*as_jax((x, weights, chosen, experts)), CONFIG, pages, as_jax(slots)),
    )
    plan = dense_plan(slots, 2)
    assert isinstance(plan.slots, jax.Array)
    same(lora_linear(x, router, None, pages["router"], plan), jax.jit(lora_linear)(*as_jax((x, router))))
    mask = torch.tensor([True] * 5 + [False])
    masked = moe_lora(x, router, experts, CONFIG, pages, slots, row_mask=mask)
    assert not masked[5].any()
    requests = {"request_lengths": torch.tensor([2, 4]), "request_slots": torch.tensor([0, -1])}
    by_request = moe_lora(x, router, experts, CONFIG, pages, **requests)
    by_row = moe_lora(x, router, experts, CONFIG, pages, torch.tensor([0, 0, -1, -1, -1, -1]))
    assert torch.equal(by_request, by_row)


def test_tensors_and_arrays_may_be_mixed_and_the_rows_decide_what_comes_back():
    x, router, experts, slots = inputs()
    pages, arrays = bank(), as_jax(experts)
    expected = moe_lora(x, router, experts, CONFIG, pages, slots)
    assert torch.equal(moe_lora(x, as_jax(router), arrays, CONFIG, pages, np.asarray(slots)), expected)
    same(expected, moe_lora(as_jax(x), router, experts, CONFIG, pages, slots))


def test_a_block_of_transformers_gives_its_weights_as_they_are():
    """The layer in place of a torch module: its own parameters, rows and router, and adapters on top."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    sizes = {"hidden_size": D, "moe_intermediate_size": F, "num_experts": E, "num_experts_per_tok": K}
    block = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**sizes, norm_topk_prob=True)).eval()
    x, config = inputs()[0], MoEConfig(D, F, E, K, renormalize=True)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.1)
        gate, up = block.experts.gate_up_proj.chunk(2, dim=1)
        experts = ExpertWeights(gate, up, block.experts.down_proj)
        expected = block(x[None])
        expected = (expected[0] if isinstance(expected, tuple) else expected)[0]
        y = moe_lora(x, block.gate.weight, experts, config, bank(), torch.full((T,), -1))
        adapted = moe_lora(x, block.gate.weight, experts, config, bank(), torch.zeros(T, dtype=torch.int64))
    assert difference(y, expected).relative < 1e-6
    assert difference(adapted, expected).relative > 0.1


def test_what_was_computed_stays_when_the_caller_writes_into_the_tensors():
    x, router, experts, slots = inputs()
    expected = moe_lora(x.clone(), router, experts, CONFIG, bank(), slots.clone())
    for rows in (x.clone(), as_jax(x)):
        ids, weight = slots.int().clone(), router.clone()
        y, plan = moe_lora(rows, weight, experts, CONFIG, bank(), ids), dense_plan(ids, 2)
        for written in (rows, weight, ids):
            if isinstance(written, torch.Tensor):
                written.zero_()
        np.testing.assert_array_equal(np.asarray(y), expected)
        np.testing.assert_array_equal(plan.slots, slots)


def test_an_aliased_pair_of_tensors_is_written_as_a_fused_adapter():
    a, b = torch.ones(E, 5, D), torch.ones(E, F, 5)
    weights = {(0, module): uniform(a, b, 2.0, E) for module in ("gate", "up")}
    _, spec = from_adapter(LoRAAdapter("aliased", weights), moe_sites(CONFIG))
    assert (spec.layout, spec.rank) == ("fused", 5)


def test_a_difference_may_be_taken_of_tensors():
    x = inputs("bfloat16")[0]
    assert difference(x, as_jax(x)).equal
    assert difference(x + 1, x).max_abs == pytest.approx(1, rel=0.02)


def test_the_flax_modules_take_tensors():
    x, _, _, slots = inputs()
    layer = MoELoRA(CONFIG, max_adapters=2, max_rank=16, rngs=nnx.Rngs(0))
    load(layer, lambda held: insert(held, 0, per_expert_adapter(CONFIG, 5)))
    same(layer(x, slots), nnx.jit(lambda module, *rows: module(*rows))(layer, *as_jax((x, slots))))
    same(Router(CONFIG, rngs=nnx.Rngs(0))(x), Router(CONFIG, rngs=nnx.Rngs(0))(as_jax(x)))
    weights, chosen = torch.ones(T, K) / K, torch.zeros(T, K, dtype=torch.int64)
    experts = RoutedExperts(CONFIG, rngs=nnx.Rngs(0))
    same(experts(x, weights, chosen), nnx.jit(lambda m, *rows: m(*rows))(experts, *as_jax((x, weights, chosen))))
    linear = LoRALinear(D, 8, max_adapters=2, max_rank=16, rngs=nnx.Rngs(0))
    assert linear(x.half(), slots).dtype == torch.float16


def test_an_int64_slot_beyond_int32_is_a_base_row():
    """Cut to 32 bits, 2**32 would be slot 0."""
    x, router, experts, _ = inputs()
    beyond = torch.full((T,), 2**32)
    assert torch.equal(moe_lora(x, router, experts, CONFIG, bank(), beyond), moe_lora(x, router, experts, CONFIG))


def test_a_view_is_taken_as_what_it_shows():
    x, router, experts, slots = inputs()
    turned = ExpertWeights(experts.gate.mT.contiguous().mT, experts.up, experts.down)
    apart = torch.stack((x, x), dim=1)[:, 0]
    assert not turned.gate.is_contiguous()
    expected = moe_lora(x, router, experts, CONFIG, bank(), slots)
    assert torch.equal(moe_lora(apart, router, turned, CONFIG, bank(), slots), expected)


def test_a_tensor_that_requires_a_gradient_is_refused_where_it_would_get_none():
    x, router, experts, slots = inputs()
    x = torch.nn.Parameter(x)
    with pytest.raises(InputError, match=r"x is a torch tensor that requires a gradient.*torch\.no_grad\(\)"):
        moe_lora(x, router, experts, CONFIG, bank(), slots)
    with torch.no_grad():
        y = moe_lora(x, router, experts, CONFIG, bank(), slots)
    assert torch.equal(y, moe_lora(x.detach(), router, experts, CONFIG, bank(), slots))


def test_bad_tensors_are_refused_as_bad_arrays_are():
    x, router, experts, slots = inputs()
    with pytest.raises(InputError, match="router is a torch tensor of float64; expected float32, bfloat16 or float16"):
        moe_lora(x, router.double(), experts, CONFIG)
    with pytest.raises(InputError, match="x has dtype int32; expected floating point"):
        moe_lora(x.int(), router, experts, CONFIG)
    with pytest.raises(InputError, match=r"slots has shape \[5\]; expected \[6\]"):
        moe_lora(x, router, experts, CONFIG, bank(), slots[:5])
    with pytest.raises(InputError, match="x is a torch tensor; expected an array, which"):
        checks.check_array("x", x, ("T", D), "floating point")  # of a function that takes none
    requests = {"request_lengths": torch.tensor([4, 4]), "request_slots": torch.tensor([0, 0])}
    with pytest.raises(InputError, match=r"request_lengths are \[4, 4\]; expected none negative and a sum of at most"):
        moe_lora(x, router, experts, CONFIG, bank(), **requests)
    with pytest.raises(InputError, match=r"x is a torch tensor \[6, 64\] of torch.float32 on meta, which jax cannot"):
        moe_lora(x.to("meta"), router, experts, CONFIG)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_of_tensors_is_inserted_as_one_of_arrays(dtype):
    adapter = per_expert_adapter(CONFIG, 5)

    def tensors(weights: LoRAWeights) -> LoRAWeights:
        a, b = (torch.nn.Parameter(torch.from_numpy(side).to(getattr(torch, dtype))) for side in (weights.a, weights.b))
        return uniform(a, b, 2.0, E)

    given = LoRAAdapter("mine", {key: tensors(weights) for key, weights in adapter.weights.items()})
    empty = create_bank(moe_sites(CONFIG), 2, 16, None, dtype)
    for ours, theirs in zip(*map(jax.tree.leaves, (insert(empty, 0, given), insert(empty, 0, adapter))), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_that_two_modules_share_is_stored_once(dtype):
    a, b = torch.ones(E, 5, D, dtype=getattr(torch, dtype)), torch.ones(E, F, 5, dtype=getattr(torch, dtype))
    weights = {(0, module): uniform(a, b, 1.0, E) for module in ("gate", "up")}
    packed = pack(LoRAAdapter("aliased", weights), moe_sites(CONFIG))
    assert {width: pages.num_pages for width, pages in packed.widths.items()} == {D: E, F: E}


def test_token_ids_may_be_tensors():
    from jax_moe_lora.arguments import array, host_array, per_prompt, sequence

    ids = torch.tensor([[1, 2], [3, 4]])
    assert [row.tolist() for row in sequence("prompts", ids)] == [[1, 2], [3, 4]]
    assert array("token_ids", ids).tolist() == [[1, 2], [3, 4]]
    assert per_prompt("seed", torch.tensor([5, 6]), 2) == [5, 6]
    assert host_array(torch.ones(2, dtype=torch.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layer_called_on_cuda_tensors_gives_a_cuda_tensor(dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a torch that uses the GPU")
    x, router, experts, slots = jax.tree.map(lambda leaf: leaf.cuda(), inputs(dtype))
    pages = bank(dtype)
    y = moe_lora(x, router, experts, CONFIG, pages, slots)
    assert y.device == x.device
    on_host = moe_lora(*inputs(dtype)[:3], CONFIG, pages, slots.cpu())
    assert on_host.device.type == "cpu"
    assert torch.equal(y.cpu(), on_host)
    x.zero_()  # after the call, on torch's own stream: what was computed stays
    assert torch.equal(y.cpu(), on_host)
