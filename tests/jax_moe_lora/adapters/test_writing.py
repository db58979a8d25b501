"""Adapters are written in every layout, and read back as they were, by this library and by PEFT; or refused by name."""

import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jax_moe_lora import AdapterFormatError, InputError, LoRAAdapter, LoRAWeights, Model, Site, write_adapter
from jax_moe_lora.adapters import writing
from jax_moe_lora.adapters.formats.detect import read_adapter
from jax_moe_lora.adapters.formats.names import AdapterNames
from jax_moe_lora.adapters.lora import uniform
from jax_moe_lora.models.names import adapter_names
from jax_moe_lora.models.sites import adapter_sites
from support.adapter_files import CONFIG, GPT_OSS, SIDECAR, TRTLLM, WEIGHTS, WIDTHS, draw, stacks, write
from support.layers import assert_close
from support.models import ADAPTER_NAMES
from support.networks import ATTENTION, EXPERTS, FIRST, TINY, peft_logits, save_model, save_random_adapter, tiny

pytestmark = [pytest.mark.parity, pytest.mark.xdist_group("writing")]

D, F, E, L = 16, 12, 4, 3
# Layer 1 is dense.
SITES = {
    "q": Site(D, 2 * D, 1, (0, 1, 2)),
    "router": Site(D, E, 1, (0, 2)),
    "mlp_gate": Site(D, 20, 1, (1,)),
    "gate": Site(D, F, E, (0, 2)),
    "up": Site(D, F, E, (0, 2)),
    "down": Site(F, D, E, (0, 2)),
}
TOKENS = np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, 12))


def matrices(random: np.random.Generator, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    return random.standard_normal(shape, dtype=np.float32).astype(dtype)


def drawn(
    modules: str = "gate up down q router mlp_gate",
    rank: int = 4,
    scale: float = 2.0,
    shared: tuple[str, ...] = (),
    one_a: bool = False,
    layers: tuple[int, ...] = (0, 1, 2),
    dtype: Any = np.float32,
) -> LoRAAdapter:
    """An adapter on `SITES`; `shared`: sides such as `down b`. `one_a`: gate and up hold one array."""
    random, weights = np.random.default_rng(0), {}
    for layer in layers:
        for module in modules.split():
            site = SITES[module]
            if layer in site.layers:
                lead = {side: 1 if f"{module} {side}" in shared else site.num_experts for side in "ab"}
                a = matrices(random, lead["a"], rank, site.in_width, dtype=dtype)
                b = matrices(random, lead["b"], site.out_width, rank, dtype=dtype)
                a = weights[layer, "gate"].a if one_a and module == "up" else a
                weights[layer, module] = uniform(a, b, scale, site.num_experts)
    return LoRAAdapter("mine", weights)


def per_expert(ranks: Mapping[str, list[int]], scales: Mapping[str, list[float]]) -> LoRAAdapter:
    """Each expert of a module in layer 0 with its own rank and scale."""
    random, weights = np.random.default_rng(1), {}
    for module, own in ranks.items():
        rank, site = np.array(own, np.int32), SITES[module]
        a, b = matrices(random, E, max(own), site.in_width), matrices(random, E, site.out_width, max(own))
        beyond = np.arange(max(own)) >= rank[:, None]
        a[beyond], b.swapaxes(1, 2)[beyond] = 0, 0
        weights[0, module] = LoRAWeights(a, b, rank, np.float32(scales[module]) * (rank > 0))
    return LoRAAdapter("mine", weights)


def alone(module: str, ranks: Sequence[int] = (2,) * E, scales: Sequence[float] = (1.0,) * E) -> LoRAAdapter:
    return per_expert({module: list(ranks)}, {module: list(scales)})


def joined(*adapters: LoRAAdapter) -> LoRAAdapter:
    return LoRAAdapter("mine", {key: weights for adapter in adapters for key, weights in adapter.weights.items()})


def assert_same(found: LoRAAdapter, expected: LoRAAdapter) -> None:
    """Equal matrices, ranks and scales, and what is one matrix in one is one in the other."""
    assert set(found.weights) == set(expected.weights)
    for key, own in expected.weights.items():
        for name in ("a", "b", "ranks", "scale"):
            there = getattr(found.weights[key], name)
            assert there.dtype == getattr(own, name).dtype, (key, name)
            np.testing.assert_array_equal(there, getattr(own, name), err_msg=f"{key} {name}")


def rewritten(adapter: LoRAAdapter, folder: Path, layout: str, names: AdapterNames = ADAPTER_NAMES, **options: bool):
    """What is read back, and the notes."""
    notes = write_adapter(adapter, folder, SITES, names, layout, **options)
    return read_adapter(folder, SITES, names, "mine"), notes


# Layout, and adapters that it holds as they are.
HELD: dict[str, tuple[str, LoRAAdapter]] = {
    "3-D": ("peft", drawn(one_a=True)),
    "3-D, some layers": ("peft", drawn(one_a=True, layers=(1, 2))),
    "3-D, down alone": ("peft", drawn("down")),
    "3-D, attention alone": ("peft", drawn("q")),
    "3-D, bfloat16": ("peft", drawn(one_a=True, dtype=ml_dtypes.bfloat16)),
    "3-D, thirds": ("peft", drawn(one_a=True, rank=3, scale=16 / 3)),
    "3-D, rank-stabilised": ("peft", replace(drawn(one_a=True, rank=5, scale=8 / 5**0.5), source={"use_rslora": True})),
    "3-D, no whole alpha": ("peft", drawn(one_a=True, rank=7, scale=0.1234567)),
    "per expert": ("peft-per-expert", drawn()),
    "per expert, bfloat16": ("peft-per-expert", drawn(dtype=ml_dtypes.bfloat16)),
    "per expert, own ranks and scales": (
        "peft-per-expert",
        per_expert({"gate": [2, 0, 3, 2], "down": [0, 1, 0, 5]}, {"gate": [2, 0, 7 / 3, 1], "down": [0, 3, 0, 0.3]}),
    ),
    "Tinker": ("tinker", drawn(shared=("gate a", "up a", "down b"))),
    "Tinker, nothing shared": ("tinker", drawn(dtype=ml_dtypes.bfloat16)),
    "Tinker, both sides": ("tinker", drawn(shared=("gate a", "gate b", "up b"))),
    "TensorRT-LLM": ("tensorrt-llm", drawn()),
    "TensorRT-LLM, ranks by module": ("tensorrt-llm", joined(drawn("gate down"), drawn("q", rank=6, scale=8 / 6))),
    "TensorRT-LLM, rank-stabilised": ("tensorrt-llm", joined(drawn("up", scale=4), drawn("q", rank=16, scale=2))),
    "TensorRT-LLM, sidecar": ("tensorrt-llm", drawn(shared=("gate a", "up a", "down b"), dtype=np.float16)),
}


@pytest.mark.parametrize("case", HELD)
def test_what_a_layout_holds_is_read_back_with_the_same_bits(tmp_path, case):
    layout, adapter = HELD[case]
    found, notes = rewritten(adapter, tmp_path / "out", layout)
    assert_same(found, adapter)
    assert notes == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("layout", ["peft", "peft-per-expert"])
def test_modules_and_layers_of_different_ranks_and_scales_are_read_back_with_the_same_bits(tmp_path, layout):
    """By patterns: for a module in all layers, and for one layer."""
    adapter, other = drawn(one_a=layout == "peft"), drawn(one_a=layout == "peft", rank=6, scale=5 / 3)
    mixed = dict(adapter.weights) | {(0, module): other.weights[0, module] for module in ("gate", "up", "q")}
    mixed |= {(layer, "down"): other.weights[layer, "down"] for layer in (0, 2)}
    found, notes = rewritten(replace(adapter, weights=mixed), tmp_path / "out", layout)
    assert_same(found, replace(adapter, weights=mixed))
    assert notes == []
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert len(config["rank_pattern"]) < 9, "patterns name a module once, not each of its experts and layers"


def test_a_config_names_its_targets_as_people_do(tmp_path):
    rewritten(drawn(one_a=True), tmp_path / "3-D", "peft")
    config = json.loads((tmp_path / "3-D" / CONFIG).read_text())
    assert config["target_modules"] == ["q_proj"]
    assert config["target_parameters"] == [*sorted(EXPERTS), "mlp.gate.weight", "mlp.gate_proj.weight"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (4, 8, {}, {})
    rewritten(drawn("gate up down q"), tmp_path / "2-D", "peft-per-expert")
    config = json.loads((tmp_path / "2-D" / CONFIG).read_text())
    assert {"down_proj", "q_proj", "mlp.experts.0.gate_proj"} <= set(config["target_modules"]), (
        "layer 1 has a gate_proj"
    )
    rewritten(drawn(), tmp_path / "tinker", "tinker")
    targets = json.loads((tmp_path / "tinker" / CONFIG).read_text())["target_modules"]
    assert targets == ["gate", "gate_proj", "q_proj", "w1", "w2", "w3"]


def test_what_the_adapters_own_config_says_of_its_base_model_is_kept(tmp_path):
    source = {"base_model_name_or_path": "Qwen/Qwen3-30B-A3B", "task_type": "CAUSAL_LM", "lora_dropout": 0.1}
    rewritten(replace(drawn("q"), source=source), tmp_path / "out", "peft")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert {name: config[name] for name in source} == {**source, "lora_dropout": 0.0}


def test_tensorrt_llms_files_are_its_packed_tensors_and_the_sidecar(tmp_path):
    """Against the file that the test writes from the same matrices."""
    own = draw({("gate", "A"), ("up", "A"), ("down", "B")})
    packed = {key: np.broadcast_to(m, (8, *m.shape[1:])) for key, m in stacks(own, TRTLLM).items()}
    expected = write(tmp_path / "theirs", packed, SIDECAR)
    sites = {module: Site(*widths, 8, (0, 1, 2)) for module, widths in WIDTHS.items()}
    weights = {key: uniform(a, b, 1.5, 8) for key, (a, b) in own.items()}
    write_adapter(LoRAAdapter("mine", weights), tmp_path / "ours", sites, ADAPTER_NAMES, "tensorrt-llm")
    files = [load_file(folder / WEIGHTS) for folder in (tmp_path / "ours", expected)]
    assert files[0].keys() == files[1].keys()
    assert all(np.array_equal(files[0][key], files[1][key]) for key in files[0])
    assert json.loads((tmp_path / "ours" / "lora_layout.json").read_text()) == SIDECAR


SHARED = drawn(shared=("gate a", "down b"))
REFUSED: dict[str, tuple[str, LoRAAdapter, str]] = {
    "a missing expert": ("peft", alone("down", ranks=[2, 0, 2, 2]), "layer 0, down: some experts are missing"),
    "a missing expert, packed": ("tensorrt-llm", alone("gate", ranks=[0, 2, 2, 2]), "gate: some experts are missing"),
    "ranks by expert": ("peft", alone("down", ranks=[2, 1, 2, 3]), r"down: its experts have ranks \[1, 2, 3\]"),
    "ranks by expert, stacks": ("tinker", alone("up", ranks=[2, 1, 2, 3]), "up: its experts have ranks"),
    "scales by expert": ("peft", alone("down", scales=[1, 1, 3, 1]), "scale is 1, 3 .* room for 3.*--fold-scale"),
    "scales of halves": ("peft", joined(drawn("gate"), drawn("up", scale=1.0)), "layer 0, up: .* is 1 .* room for 2"),
    "scales by module": ("tensorrt-llm", joined(drawn("gate up"), drawn("q", scale=1.0)), "q: .* is 1 .* room for 2"),
    "a scale past every alpha": ("peft", drawn("q", scale=1e30), r"q: its scale 1e\+30 needs an alpha above"),
    "ranks by module": ("tinker", joined(drawn("gate up"), drawn("q", rank=2)), "q: it has rank 2 and other modules 4"),
    "sharing in 3-D": ("peft", SHARED, r"layer 0, gate: A is one matrix for all experts.*--expand"),
    "sharing per expert": ("peft-per-expert", drawn("down", shared=("down b",)), r"down: B is one matrix.*--expand"),
    "one A in stacks": ("tinker", drawn(one_a=True), r"layer 0, gate: gate and up hold one A.*--expand"),
    "both sides shared": ("tensorrt-llm", drawn("up", shared=("up a", "up b")), "up: B is one matrix for all experts"),
    "double precision": ("peft", drawn("q", dtype=np.float64), "q: its matrices are float64"),
    "no such layer": ("peft", LoRAAdapter("mine", {(1, "up"): drawn("up").weights[0, "up"]}), "layer 1, up: .*no up"),
    "nothing": ("peft", joined(), "holds no weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_layout_has_no_room_for_is_refused_by_module_and_reason(tmp_path, case):
    layout, adapter, sentence = REFUSED[case]
    with pytest.raises(AdapterFormatError, match=sentence) as refused:
        rewritten(adapter, tmp_path / "out", layout)
    assert "'mine'" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def deltas(adapter: LoRAAdapter) -> dict[tuple[int, str, int], np.ndarray]:
    return {(*key, e): w.delta(e) for key, w in adapter.weights.items() for e in range(len(w.ranks))}


@pytest.mark.parametrize("layout", ["peft", "peft-per-expert", "tinker", "tensorrt-llm"])
def test_expand_writes_copies_and_says_so(tmp_path, layout):
    adapter = drawn(shared=("gate a", "gate b", "up a", "down a", "down b"), one_a=True)
    found, notes = rewritten(adapter, tmp_path / "out", layout, expand=True)
    expected = deltas(adapter)
    assert all(np.array_equal(delta, expected[key]) for key, delta in deltas(found).items())
    assert notes
    assert all("was written" in note for note in notes)
    assert len(notes) == len(set(notes))


def test_gate_and_up_of_different_a_become_the_block_diagonal_form(tmp_path):
    """Rank 4 + 3, each half with the other's ranks zero: the same update, bit for bit."""
    adapter = LoRAAdapter("mine", {**drawn("gate down").weights, **drawn("up", rank=3).weights})
    found, notes = rewritten(adapter, tmp_path / "out", "peft")
    assert notes == ["gate and up have different A, and were written as one projection of rank 4 + 3."]
    for layer in (0, 2):
        gate, up = (found.weights[layer, module] for module in ("gate", "up"))
        assert gate.a is up.a
        np.testing.assert_array_equal(gate.a, np.concatenate([adapter.weights[layer, m].a for m in ("gate", "up")], 1))
        np.testing.assert_array_equal(gate.b[:, :, :4], adapter.weights[layer, "gate"].b)
        np.testing.assert_array_equal(up.b[:, :, 4:], adapter.weights[layer, "up"].b)
        assert not gate.b[:, :, 4:].any()
        assert not up.b[:, :, :4].any()
        assert {float(s) for s in (*gate.scale, *up.scale)} == {2.0}


def test_one_half_alone_is_written_beside_zeros(tmp_path):
    found, notes = rewritten(drawn("up"), tmp_path / "out", "peft")
    assert notes == ["up stands alone, and was written as gate and up whose other half of B is zero."]
    assert not any(found.weights[layer, "gate"].b.any() for layer in (0, 2))
    assert_same(replace(found, weights={k: w for k, w in found.weights.items() if k[1] == "up"}), drawn("up"))


def test_equal_matrices_of_gate_and_up_become_one(tmp_path):
    """So that an adapter goes from 3-D parameters to per-expert matrices and back."""
    adapter = drawn("gate up down", one_a=True)
    split, _ = rewritten(adapter, tmp_path / "split", "peft-per-expert", expand=True)
    assert split.weights[0, "gate"].a is not split.weights[0, "up"].a
    found, notes = rewritten(split, tmp_path / "out", "peft")
    assert_same(found, adapter)
    assert notes == []


@pytest.mark.parametrize("case", ["scales by expert", "scales by module", "scales of halves"])
def test_fold_scale_multiplies_b_and_says_so(tmp_path, case):
    layout, adapter, _ = REFUSED[case]
    found, notes = rewritten(adapter, tmp_path / "out", layout, fold_scale=True)
    assert any("was multiplied by what the config cannot say of its scale" in note for note in notes)
    for key, expected in deltas(adapter).items():
        np.testing.assert_allclose(deltas(found)[key], expected, rtol=1e-5, atol=1e-6)


def test_a_shared_b_that_different_scales_are_folded_into_is_not_declared_shared(tmp_path):
    shared = drawn("down", shared=("down b",))
    scale = np.array([1, 2, 0.3, 1], np.float32)
    adapter = replace(shared, weights={key: replace(w, scale=scale) for key, w in shared.weights.items()})
    with pytest.raises(AdapterFormatError, match="down: B is one matrix for all experts"):
        rewritten(adapter, tmp_path / "out", "tensorrt-llm", fold_scale=True)
    found, notes = rewritten(adapter, tmp_path / "out", "tensorrt-llm", fold_scale=True, expand=True)
    assert len(notes) == 2
    for key, expected in deltas(adapter).items():
        np.testing.assert_allclose(deltas(found)[key], expected, rtol=1e-5, atol=1e-6)


def test_a_folded_scale_that_overflows_is_refused(tmp_path):
    weights = {**drawn("q", scale=1e-3).weights, **drawn("gate", scale=1e3, dtype=np.float16).weights}
    many = {key: w for key, w in weights.items() if key[1] == "q" or key[0] == 0}  # q's scale is the commonest
    with pytest.raises(AdapterFormatError, match="gate: B times its scale is not finite in float16"):
        rewritten(LoRAAdapter("mine", many), tmp_path / "out", "tensorrt-llm", fold_scale=True)


@pytest.mark.parametrize("one_a", [True, False])
def test_rows_of_gpt_oss_alternate_between_gate_and_up(tmp_path, one_a):
    adapter = drawn("gate up", one_a=one_a)
    found, _ = rewritten(adapter, tmp_path / "out", "peft", GPT_OSS)
    expected = deltas(adapter)
    for key, delta in deltas(found).items():
        np.testing.assert_allclose(delta, expected[key], rtol=1e-5, atol=1e-5)
    b = load_file(tmp_path / "out" / WEIGHTS)["base_model.model.model.layers.0.mlp.experts.lora_B.weight"]
    np.testing.assert_array_equal(b[::2].reshape(F, -1, E)[:, :4].transpose(2, 0, 1), adapter.weights[0, "gate"].b)


@st.composite
def adapters(draw: st.DrawFn) -> LoRAAdapter:
    """Modules and layers with ranks, scales, sharing and missing experts of any kind."""
    random, weights = np.random.default_rng(draw(st.integers(0, 99))), {}
    for module in draw(st.sets(st.sampled_from(sorted(SITES)), min_size=1)):
        site = SITES[module]
        ranks, scales = (
            draw(st.sampled_from([(2,), (2, 5), (0, 3)])),
            draw(st.sampled_from([(2.0,), (0.7,), (2.0, 1 / 3)])),
        )
        lead = [draw(st.sampled_from([1, site.num_experts])) for _ in "ab"]
        for layer in site.layers:
            own = np.full(site.num_experts, ranks[-1], np.int32)
            if site.num_experts in lead:
                own = np.array(draw(st.lists(st.sampled_from(ranks), min_size=len(own), max_size=len(own))), np.int32)
            scale = np.array([scales[int(e) % len(scales)] for e in range(site.num_experts)], np.float32) * (own > 0)
            a = matrices(random, lead[0], ranks[-1], site.in_width)
            weights[layer, module] = LoRAWeights(a, matrices(random, lead[1], site.out_width, ranks[-1]), own, scale)
    for layer in (0, 2):
        if (layer, "gate") in weights and (layer, "up") in weights and draw(st.booleans()):
            gate, up = weights[layer, "gate"], weights[layer, "up"]
            rank = min(gate.a.shape[1], up.a.shape[1])
            aliased = replace(up, a=gate.a[:, :rank], b=up.b[:, :, :rank], ranks=np.minimum(up.ranks, rank))
            weights[layer, "up"], weights[layer, "gate"] = (
                aliased,
                replace(gate, a=aliased.a, b=gate.b[:, :, :rank], ranks=np.minimum(gate.ranks, rank)),
            )
    return LoRAAdapter("mine", weights)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(adapters(), st.sampled_from(sorted(writing.LAYOUTS)), st.booleans(), st.booleans())
def test_whatever_is_written_computes_the_same_and_what_differs_is_said(adapter, layout, expand, fold_scale):
    with tempfile.TemporaryDirectory() as folder:
        out, options = Path(folder) / "out", {"expand": expand, "fold_scale": fold_scale}
        try:
            notes = write_adapter(adapter, out, SITES, ADAPTER_NAMES, layout, **options)
        except AdapterFormatError:
            assert not list(Path(folder).iterdir())
            return
        found = read_adapter(out, SITES, ADAPTER_NAMES)
    expected = deltas(adapter)
    for key, delta in deltas(found).items():
        np.testing.assert_allclose(delta, expected.pop(key, np.float32(0)), rtol=1e-5, atol=1e-5)
    assert not any(delta.any() for delta in expected.values())
    if not notes:
        for key, own in found.weights.items():
            before = adapter.weights[key]
            np.testing.assert_array_equal(own.ranks, before.ranks)
            np.testing.assert_array_equal(own.scale, before.scale)
            for expert in np.flatnonzero(own.ranks):
                r = own.ranks[expert]
                np.testing.assert_array_equal(own.a[expert % len(own.a), :r], before.a[expert % len(before.a), :r])
                np.testing.assert_array_equal(
                    own.b[expert % len(own.b), :, :r], before.b[expert % len(before.b), :, :r]
                )


def test_a_square_parameter_is_read_back_in_its_orientation(tmp_path):
    """2F equals D: shapes do not tell A from B, and the version that the config names does."""
    a, b = (matrices(np.random.default_rng(0), E, *shape) for shape in ((2, 24), (12, 2)))
    sites = {module: Site(24, 12, E, (0,)) for module in ("gate", "up")}
    adapter = LoRAAdapter("mine", {(0, module): uniform(a, b, 1.0, E) for module in ("gate", "up")})
    write_adapter(adapter, tmp_path / "out", sites, ADAPTER_NAMES)
    assert_same(read_adapter(tmp_path / "out", sites, ADAPTER_NAMES), adapter)


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(InputError, match="layout is 'gguf'; expected one of peft, peft-per-expert, tinker"):
        rewritten(drawn(), tmp_path / "out", "gguf")


# What PEFT makes of the folders.


def of_transformers_4() -> Any:
    """Modules with the names of transformers 4's Qwen3-MoE, which transformers 5 has no more.

    Weights are zero: merged, they are the update.
    """
    import torch

    def holding(**modules: torch.nn.Module) -> torch.nn.Module:
        holder = torch.nn.Module()
        for name, module in modules.items():
            setattr(holder, name, module)
        return holder

    def linear(into: int, out: int) -> torch.nn.Module:
        return torch.nn.Linear(into, out, bias=False)

    def expert() -> torch.nn.Module:
        return holding(gate_proj=linear(D, F), up_proj=linear(D, F), down_proj=linear(F, D))

    layers = []
    for layer in range(L):
        experts = torch.nn.ModuleList(expert() for _ in range(E))
        mlp = holding(gate=linear(D, E), experts=experts)
        if layer == 1:
            mlp = holding(gate_proj=linear(D, 20))
        layers.append(holding(mlp=mlp, self_attn=holding(q_proj=linear(D, 2 * D))))
    network = holding(model=holding(layers=torch.nn.ModuleList(layers)))
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    return network


@pytest.mark.parametrize("case", [case for case, (layout, _) in HELD.items() if layout == "peft-per-expert"])
def test_peft_merges_per_expert_matrices_of_any_ranks_as_they_were(tmp_path, case):
    from peft import PeftModel

    _, adapter = HELD[case]
    write_adapter(adapter, tmp_path / "out", SITES, ADAPTER_NAMES, "peft-per-expert")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(of_transformers_4(), tmp_path / "out").merge_and_unload()
    paths = {"q": "self_attn.q_proj", "router": "mlp.gate", "mlp_gate": "mlp.gate_proj"}
    found = dict(merged.named_parameters())
    for (layer, module), weights in adapter.weights.items():
        for expert in range(len(weights.ranks)):
            path = paths.get(module, f"mlp.experts.{expert}.{module}_proj")
            weight = found.pop(f"model.layers.{layer}.{path}.weight").detach().numpy()
            np.testing.assert_allclose(weight, weights.delta(expert), rtol=1e-5, atol=1e-6)
    assert not any(weight.any() for weight in found.values()), "PEFT found targets that the adapter does not have"


SHARED_EXPERT = [f"shared_expert.{part}_proj" for part in ("gate", "up", "down")]
DENSE_MLP = [f"layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"target_parameters": [*EXPERTS, "mlp.gate.weight", *DENSE_MLP], "rank_pattern": {"q_proj": 2}},
    "qwen2_moe": {"target_modules": [*SHARED_EXPERT, "shared_expert_gate", *ATTENTION], "target_parameters": EXPERTS},
    "mixtral": {"target_parameters": EXPERTS, "use_rslora": True, "alpha_pattern": {"v_proj": 5}},
    "olmoe": {"target_parameters": [*EXPERTS, "mlp.gate.weight"], "rank_pattern": {".*0.*down_proj": 3}},
}


@pytest.fixture(scope="module", params=FIRST)
def served(request, tmp_path_factory) -> tuple[Path, Model]:
    """A model with an adapter of PEFT's on all that its family has."""
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    base = save_model(
        tiny(name, num_hidden_layers=2, **({"mlp_only_layers": [1]} if name == "qwen3_moe" else {})), folder / "model"
    )
    model = Model.from_pretrained(base, dtype="float32", max_adapters=4, max_rank=16, adapter_targets="all")
    config = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, **CONFIGS[name]}
    model.load_adapter(save_random_adapter(base, folder / "adapter", **config), "own")
    return base, model


@pytest.mark.slow
def test_peft_computes_with_a_saved_adapter_what_this_library_does(served, tmp_path):
    base, model = served
    assert model.save_adapter("own", tmp_path / "out") == []
    assert_close(model.logits(TOKENS, ["own"] * 2), peft_logits(base, tmp_path / "out", TOKENS), 1e-5)


@pytest.mark.slow
def test_peft_computes_with_shared_sides_and_block_diagonals_what_this_library_does(served, tmp_path):
    """Ranks that differ by module, experts that share sides, gate and up of different A: expanded."""
    base, model = served
    random, weights = np.random.default_rng(2), {}
    for module, site in adapter_sites(model.config).items():
        rank, lead = 2 + len(module) % 4, {"gate": (1, 8), "down": (8, 1)}.get(module, (site.num_experts,) * 2)
        for layer in site.layers:
            a = 0.1 * matrices(random, lead[0], rank, site.in_width)
            weights[layer, module] = uniform(
                a, 0.1 * matrices(random, lead[1], site.out_width, rank), 1.7, site.num_experts
            )
    adapter = LoRAAdapter("drawn", weights)
    model.load_adapter(adapter, "drawn")
    try:
        notes = model.save_adapter("drawn", tmp_path / "out", expand=True)
        assert any("different A" in note for note in notes)
        assert_close(model.logits(TOKENS, ["drawn"] * 2), peft_logits(base, tmp_path / "out", TOKENS), 1e-5)
    finally:
        model.unload_adapter("drawn")


@pytest.mark.slow
def test_peft_converts_written_per_expert_matrices_to_what_they_were(tmp_path):
    """Under transformers 5, where peft fuses gate and up; it knows the names of Qwen3-MoE."""
    base = save_model(tiny("qwen3_moe", num_hidden_layers=1), tmp_path / "model")
    model = Model.from_pretrained(base, dtype="float32", max_adapters=1, max_rank=8)
    own = save_random_adapter(base, tmp_path / "adapter", r=4, target_modules=["q_proj"], target_parameters=EXPERTS)
    model.load_adapter(own, "own")
    model.save_adapter("own", tmp_path / "out", "peft-per-expert", expand=True)
    assert_close(model.logits(TOKENS, ["own"] * 2), peft_logits(base, tmp_path / "out", TOKENS), 1e-5)


@pytest.mark.parametrize("layout", ["peft-per-expert", "tinker", "tensorrt-llm"])
def test_every_layout_of_a_family_is_read_back(served, tmp_path, layout):
    """Under the family's own names: Mixtral's, and shared experts'."""
    _, model = served
    sites, names = adapter_sites(model.config), adapter_names(model.config)
    without_a_name = {"peft-per-expert": (), "tinker": ("embedding",), "tensorrt-llm": ("embedding", "head")}[layout]
    random = np.random.default_rng(3)
    weights = {
        (layer, module): uniform(
            matrices(random, site.num_experts, 2, site.in_width),
            matrices(random, site.num_experts, site.out_width, 2),
            1.5,
            site.num_experts,
        )
        for module, site in sites.items()
        for layer in site.layers
        if module not in without_a_name
    }
    assert model.save_adapter(LoRAAdapter("all", weights), tmp_path / "out", layout) == []
    assert_same(read_adapter(tmp_path / "out", sites, names), LoRAAdapter("all", weights))


def test_a_model_saves_what_the_bank_holds_where_the_folder_is_gone(tmp_path):
    base = save_model(tiny("qwen3_moe", num_hidden_layers=1), tmp_path / "model")
    model = Model.from_pretrained(base, dtype="float32", max_adapters=1, max_rank=8)
    own = save_random_adapter(base, tmp_path / "adapter", r=4, target_modules=["q_proj"], target_parameters=EXPERTS)
    model.load_adapter(own, "own")
    before = read_adapter(own, adapter_sites(model.config), ADAPTER_NAMES)
    own.rename(tmp_path / "elsewhere")
    assert model.save_adapter("own", tmp_path / "out") == []
    assert_same(read_adapter(tmp_path / "out", adapter_sites(model.config), ADAPTER_NAMES), before)
