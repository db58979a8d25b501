"""Every adapter layout: logits against PEFT on the same file, or against transformers with merged weights.

Files are written by peft where it writes the layout, else by safetensors as the layout's own system writes it.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layers import assert_close, figures
from networks import EXPERTS, TINY, load_peft, peft_logits, save_model, save_random_adapter, tiny_qwen3_moe
from networks import split_to_per_expert as split
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeForCausalLM

from jax_moe_lora import AdapterFormatError, Model
from jax_moe_lora.adapters.formats.detect import read_adapter
from jax_moe_lora.adapters.formats.names import AdapterNames
from jax_moe_lora.adapters.lora import LoRAAdapter, Site
from jax_moe_lora.inspect import inspect_adapter
from jax_moe_lora.models.decoder import adapter_sites
from jax_moe_lora.models.qwen3_moe import ADAPTER_NAMES

pytestmark = [pytest.mark.parity, pytest.mark.xdist_group("parity")]

D, F, E = (TINY[size] for size in ("hidden_size", "moe_intermediate_size", "num_experts"))
LAYERS = range(TINY["num_hidden_layers"])
WIDTHS = {"gate": (D, F), "up": (D, F), "down": (F, D)}  # in, out
SHARED_OUTER = {("gate", "A"), ("up", "A"), ("down", "B")}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXPERTS_PATH = "base_model.model.model.layers.{}.mlp.experts"
TINKER = {"gate": "w1", "up": "w3", "down": "w2"}
TRTLLM = {"gate": "moe_h_to_4h", "up": "moe_gate", "down": "moe_4h_to_h"}
SIDECAR = {"version": 1, "moe_shared_outer": {TRTLLM[m]: {"shared_side": side} for m, side in sorted(SHARED_OUTER)}}
MIXTRAL = AdapterNames(
    dense={"mlp.gate": "router", "block_sparse_moe.gate": "router"},
    experts={"w1": "gate", "w3": "up", "w2": "down"},
    experts_path="mlp.experts",
    per_expert_path="block_sparse_moe.experts",
)
GPT_OSS = replace(ADAPTER_NAMES, interleaved=True, stored_in_out=True)
Matrices = Mapping[tuple[int, str], tuple[np.ndarray, np.ndarray]]  # (layer, module) -> A and B, each [E or 1, ...]


@dataclass(frozen=True)
class Written:
    """An adapter's folder, what its logits are by another implementation, and what its layout is called."""

    folder: Path
    expected: Callable[[np.ndarray], np.ndarray]
    layout: str
    names: AdapterNames = ADAPTER_NAMES


def write(folder: Path, tensors: Mapping[str, np.ndarray], sidecar: Any = None, **config: Any) -> Path:
    """A folder with these tensors; a server's config may hold no more than rank and alpha, and `...` leaves one out."""
    folder.mkdir(parents=True)
    save_file({key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}, folder / WEIGHTS)
    fields = {"r": 4, "lora_alpha": 6, **config}
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))
    if sidecar is not None:
        (folder / "lora_layout.json").write_text(json.dumps(sidecar))
    return folder


def draw(shared: set[tuple[str, str]], rank: int = 4) -> Matrices:
    rng = np.random.default_rng(len(shared))

    def matrix(module: str, side: str, *shape: int) -> np.ndarray:
        lead = 1 if (module, side) in shared else E
        return 0.1 * rng.standard_normal((lead, *shape), dtype=np.float32)

    return {
        (layer, module): (matrix(module, "A", rank, in_width), matrix(module, "B", out_width, rank))
        for layer in LAYERS
        for module, (in_width, out_width) in WIDTHS.items()
    }


def stacks(matrices: Matrices, names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Tensors of a layout with one stack for each module and side."""
    return {
        f"{EXPERTS_PATH.format(layer)}.{names[module]}.lora_{side}.weight": matrix
        for (layer, module), pair in matrices.items()
        for side, matrix in zip("AB", pair, strict=True)
    }


def merged_logits(base: Path, deltas: Mapping[tuple[int, str], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Logits of transformers with `[E, out, in]` added to the experts' weights."""

    def logits(tokens: np.ndarray) -> np.ndarray:
        network = Qwen3MoeForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        rows = {"gate": slice(0, F), "up": slice(F, None), "down": slice(None)}
        with torch.no_grad():
            for (layer, module), delta in deltas.items():
                experts = network.model.layers[layer].mlp.experts
                weight = experts.down_proj if module == "down" else experts.gate_up_proj
                weight[:, rows[module]] += torch.tensor(delta)
            return network(torch.tensor(tokens)).logits.numpy()

    return logits


def merged(base: Path, matrices: Matrices, scale: float = 6 / 4) -> Callable[[np.ndarray], np.ndarray]:
    return merged_logits(
        base, {key: np.broadcast_to(scale * (b @ a), (E, b.shape[1], a.shape[2])) for key, (a, b) in matrices.items()}
    )


def by_peft(base: Path, folder: Path, reference: Path | None = None) -> Callable[[np.ndarray], np.ndarray]:
    return lambda tokens: peft_logits(base, reference or folder, tokens)


def peft(layout: str = "PEFT, 3-D parameters", **config: Any) -> Callable[[Path, Path], Written]:
    def make(base: Path, folder: Path) -> Written:
        save_random_adapter(base, folder, r=4, lora_alpha=6, **config)
        return Written(folder, by_peft(base, folder), layout)

    return make


def transposed(base: Path, folder: Path) -> Written:
    """As peft up to 0.19.0 wrote and merged it: it took `(E, 2F, D)` for `(E, in, out)`."""
    rng, tensors, deltas = np.random.default_rng(1), {}, {}
    for layer in LAYERS:
        for key, i, o in ((".base_layer", 2 * F, D), ("", D, F)):
            a, b = (0.1 * rng.standard_normal(shape, dtype=np.float32) for shape in ((4 * E, i), (o, 4 * E)))
            path = EXPERTS_PATH.format(layer) + key
            tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
            delta = 1.5 * np.einsum("ore,eri->eio", b.reshape(o, 4, E), a.reshape(E, 4, i))
            deltas |= {(layer, "gate"): delta[:, :F], (layer, "up"): delta[:, F:]} if key else {(layer, "down"): delta}
    write(folder, tensors, peft_version="0.18.1", target_modules=None, target_parameters=EXPERTS)
    return Written(folder, merged_logits(base, deltas), "PEFT, 3-D parameters")


def per_expert(base: Path, folder: Path) -> Written:
    source = save_random_adapter(base, folder / "source", r=4, lora_alpha=6, target_parameters=EXPERTS)
    split(source, folder / "split", E)
    return Written(folder / "split", by_peft(base, folder / "split"), "PEFT, per-expert matrices")


def converted(base: Path, folder: Path) -> Written:
    """What peft makes of the per-expert form: rank 2r, a block-diagonal B, and patterns."""
    load_peft(base, per_expert(base, folder).folder).save_pretrained(folder / "converted")
    assert json.loads((folder / "converted" / CONFIG).read_text())["rank_pattern"] == {".*\\.gate_up_proj": 8}
    return Written(folder / "converted", by_peft(base, folder / "converted"), "PEFT, 3-D parameters")


def mixtral(base: Path, folder: Path) -> Written:
    source = per_expert(base, folder)
    tensors = {}
    for key, tensor in load_file(source.folder / WEIGHTS).items():
        for ours, theirs in (("mlp", "block_sparse_moe"), ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            key = key.replace(f".{ours}.", f".{theirs}.")
        tensors[key] = tensor
    write(folder / "mixtral", tensors, target_modules=["w1", "w2", "w3"])
    return replace(source, folder=folder / "mixtral", names=MIXTRAL)


def gpt_oss(base: Path, folder: Path) -> Written:
    """Rows of gate_up_proj's B alternate between gate and up."""
    source = peft(target_parameters=EXPERTS)(base, folder / "source")
    tensors = load_file(source.folder / WEIGHTS)
    for key, b in tensors.items():
        if "base_layer.lora_B" in key:
            tensors[key] = np.stack(np.split(b, 2), axis=1).reshape(b.shape)
    write(folder / "interleaved", tensors, target_modules=None, target_parameters=EXPERTS)
    return replace(source, folder=folder / "interleaved", names=GPT_OSS)


def tinker(base: Path, folder: Path) -> Written:
    matrices = draw(SHARED_OUTER)
    write(folder, stacks(matrices, TINKER), peft_type="LORA", target_modules="all-linear")
    return Written(folder, merged(base, matrices), "Tinker")


def sglang(base: Path, folder: Path) -> Written:
    """One shared A for both halves of gate_up_proj."""
    matrices, tensors = dict(draw(SHARED_OUTER)), {}
    for layer in LAYERS:
        (a, gate), (_, up), down = (matrices[layer, module] for module in ("gate", "up", "down"))
        matrices[layer, "up"] = a, up
        for part, pair in (("gate_up_proj", (a, np.concatenate([gate, up], axis=1))), ("down_proj", down)):
            tensors |= {
                f"{EXPERTS_PATH.format(layer)}.{part}.lora_{s}.weight": m for s, m in zip("AB", pair, strict=True)
            }
    write(folder, tensors, peft_type="LORA", target_modules=["gate_up_proj", "down_proj"])
    return Written(folder, merged(base, matrices), "SGLang")


def trtllm(shared: bool, copies: bool = False, sidecar: Any = None) -> Callable[[Path, Path], Written]:
    def make(base: Path, folder: Path) -> Written:
        matrices = draw(SHARED_OUTER if shared else set())
        tensors = stacks(matrices, TRTLLM)
        if copies:
            tensors = {key: np.broadcast_to(tensor, (E, *tensor.shape[1:])) for key, tensor in tensors.items()}
        write(folder, tensors, sidecar, use_rslora=True, target_modules=["gate_proj", "up_proj", "down_proj"])
        return Written(folder, merged(base, matrices, 6 / 2), "TensorRT-LLM")

    return make


LAYOUTS: dict[str, Callable[[Path, Path], Written]] = {
    "peft_3d": peft(target_parameters=EXPERTS),
    "peft_3d_transposed": transposed,
    "peft_gate_up_alone": peft(target_parameters=EXPERTS[:1]),
    "peft_down_alone": peft(target_parameters=EXPERTS[1:]),
    "peft_patterns": peft(
        target_parameters=EXPERTS, rank_pattern={"down_proj": 3}, alpha_pattern={".*gate_up_proj": 9}
    ),
    "peft_per_expert": per_expert,
    "peft_converted": converted,
    "peft_attention": peft("PEFT, no experts", target_modules=["q_proj", "v_proj"]),
    "mixtral_per_expert": mixtral,
    "gpt_oss_interleaved": gpt_oss,
    "tinker": tinker,
    "sglang": sglang,
    "trtllm_per_expert": trtllm(shared=False),
    "trtllm_copies_and_sidecar": trtllm(shared=True, copies=True, sidecar=SIDECAR),
    "trtllm_one_matrix_and_sidecar": trtllm(shared=True, sidecar=SIDECAR),
    "trtllm_one_matrix": trtllm(shared=True),
}
TOKENS = np.random.default_rng(0).integers(0, TINY["vocab_size"], (len(LAYOUTS) + 1, 12))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_model(tiny_qwen3_moe(), tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def sites(base) -> dict[str, Site]:
    return adapter_sites(Model.from_pretrained(base, dtype="float32", max_adapters=1, max_rank=1).config)


@pytest.fixture(scope="module")
def written(base, tmp_path_factory) -> dict[str, Written]:
    return {name: make(base, tmp_path_factory.mktemp(name) / "adapter") for name, make in LAYOUTS.items()}


@pytest.fixture(scope="module")
def base_logits(base) -> np.ndarray:
    return peft_logits(base, None, TOKENS)


@pytest.fixture(scope="module")
def mixed(base, sites, written) -> np.ndarray:
    """Logits of one batch whose rows use every layout, and the base model in the last."""
    model = Model.from_pretrained(base, dtype="float32", max_adapters=len(LAYOUTS), max_rank=8)
    for name, case in written.items():
        model.load_adapter(read_adapter(case.folder, sites, case.names, name), adapter_name=name)
    return np.asarray(model.logits(TOKENS, [*LAYOUTS, None]))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_mixed_batchs_logits_equal_those_of_another_implementation(written, mixed, base_logits, name):
    row = list(LAYOUTS).index(name)
    assert_close(mixed[row], written[name].expected(TOKENS[row : row + 1])[0], 1e-5)
    assert figures(mixed[row], base_logits[row])["relative"] > 1e-3, "the adapter changes nothing; this proves nothing"


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_is_reported(sites, written, name):
    case = written[name]
    assert read_adapter(case.folder, sites, case.names).layout == case.layout
    assert inspect_adapter(case.folder).layout == case.layout


def read(folder: Path, sites: Mapping[str, Site], names: AdapterNames = ADAPTER_NAMES) -> LoRAAdapter:
    return read_adapter(folder, sites, names)


@pytest.mark.parametrize("parts", [TINKER, TRTLLM], ids=["tinker", "trtllm"])
def test_each_of_the_six_sides_is_shared_or_not_by_itself(sites, tmp_path, parts):
    six = list(product(WIDTHS, "AB"))
    for number in range(64):
        shared = {side for bit, side in enumerate(six) if number >> bit & 1}
        matrices = draw(shared)
        adapter = read(write(tmp_path / str(number), stacks(matrices, parts)), sites)
        for (layer, module), (a, b) in matrices.items():
            found = adapter.weights[layer, module]
            assert len(found.a) == (1 if (module, "A") in shared else E)
            assert len(found.b) == (1 if (module, "B") in shared else E)
            for expert in range(E):
                own = 1.5 * (b[expert % len(b)] @ a[expert % len(a)])
                np.testing.assert_allclose(found.delta(expert), own, rtol=1e-6, atol=1e-8)


def test_gate_and_up_that_share_an_a_hold_one_array(sites, written):
    for name in ("peft_3d", "peft_3d_transposed", "peft_converted", "gpt_oss_interleaved", "sglang"):
        weights = read(written[name].folder, sites, written[name].names).weights
        assert all(weights[layer, "gate"].a is weights[layer, "up"].a for layer in LAYERS), name


def test_gpt_oss_is_read_as_peft_merges_it(tmp_path):
    """The real family: parameters `(E, in, out)`, interleaved; peft merges into weights of zero."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 9}
    config = GptOssConfig(hidden_size=16, intermediate_size=12, num_local_experts=3, num_experts_per_tok=2, **sizes)
    network = GptOssForCausalLM(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(network, LoraConfig(r=2, target_parameters=EXPERTS))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                parameter.copy_(torch.randn_like(parameter) if "lora_" in name else torch.zeros_like(parameter))
        wrapped.save_pretrained(tmp_path)
        experts = wrapped.merge_and_unload().model.layers[0].mlp.experts
    gate_up, down = (p.detach().numpy().swapaxes(1, 2) for p in (experts.gate_up_proj, experts.down_proj))
    sites = {"gate": Site(16, 12, 3, (0,)), "up": Site(16, 12, 3, (0,)), "down": Site(12, 16, 3, (0,))}
    weights = read(tmp_path, sites, GPT_OSS).weights
    for module, expected in (("gate", gate_up[:, ::2]), ("up", gate_up[:, 1::2]), ("down", down)):
        assert expected.any()
        for expert in range(3):
            np.testing.assert_allclose(weights[0, module].delta(expert), expected[expert], rtol=1e-5, atol=1e-5)


def test_a_sidecar_beside_per_expert_matrices_makes_one_matrix_of_equal_ones(sites, tmp_path):
    a, b = draw({("gate", "A")})[0, "gate"]
    tensors = {}
    for expert in range(E):
        path = f"{EXPERTS_PATH.format(0)}.{expert}.gate_proj"
        tensors |= {f"{path}.lora_A.weight": a[0], f"{path}.lora_B.weight": b[expert]}
    folder = write(tmp_path / "adapter", tensors, SIDECAR, target_modules=["gate_proj"])
    gate = read(folder, sites).weights[0, "gate"]
    assert gate.a.shape == (1, 4, D)
    np.testing.assert_allclose(gate.delta(3), 1.5 * (b[3] @ a[0]), rtol=1e-6, atol=1e-8)


GATE = {
    key: tensor
    for key, tensor in stacks(draw({("gate", "A")}), TRTLLM).items()
    if "layers.0" in key and "h_to_4h" in key
}
GATE_A, GATE_B = GATE
COPIES = {**GATE, GATE_A: np.broadcast_to(GATE[GATE_A], (E, 4, D))}
REFUSED = {
    "no_alpha": (GATE, {"lora_alpha": ...}, "lora_alpha is missing"),
    "no_rank": (GATE, {"r": ...}, "r is None"),
    "another_rank": (GATE, {"r": 3}, "it has rank 4, and adapter_config.json says 3"),
    "not_targeted": (GATE, {"target_modules": ["up_proj"]}, r"does not target model\.layers\.0.*moe_h_to_4h"),
    "missing_target": (GATE, {"target_modules": ["w1", "w3"]}, "targets 'w3'.*no weights"),
    "two_dimensions": ({**GATE, GATE_A: GATE[GATE_A][0]}, {}, r"lora_A.*\[4, 64\].*\[1, 4, 64\]"),
    "some_experts": ({**GATE, GATE_B: GATE[GATE_B][:3]}, {}, r"lora_B.*\[3, 24, 4\].*\[8, 24, 4\]"),
    "stacked_halves": (
        {f"{EXPERTS_PATH.format(0)}.gate_up_proj.lora_{side}.weight": np.zeros(shape, np.float32)
         for side, shape in (("A", (1, 8, D)), ("B", (E, 2 * F, 4)))},
        {"r": 8}, r"lora_B.*\[8, 48, 4\].*\[8, 48, 8\]",
    ),
    "unknown_part": ({key.replace("moe_h_to_4h", "w4"): tensor for key, tensor in GATE.items()}, {}, r"w4\.lora_A"),
    "two_layouts": (
        {**GATE, **{key.replace("moe_h_to_4h", "w3"): tensor for key, tensor in GATE.items()}},
        {}, r"w3\.lora_A.*'Tinker' under mlp\.experts.*'TensorRT-LLM'",
    ),
    "sidecar_version": (GATE, {"sidecar": {**SIDECAR, "version": 2}}, r"lora_layout\.json.*version 1"),
    "sidecar_field": (GATE, {"sidecar": {**SIDECAR, "x": 1}}, r"lora_layout\.json.*version 1"),
    "sidecar_module": (GATE, {"sidecar": {"moe_shared_outer": {"w1": {"shared_side": "A"}}}}, r"lora_layout\.json.*w1"),
    "sidecar_side": (GATE, {"sidecar": {"moe_shared_outer": {"moe_gate": "A"}}}, r"lora_layout\.json.*moe_gate"),
    "sidecar_denies": (GATE, {"sidecar": {"version": 1}}, "side A of gate in layer 0 is one matrix.*not declare"),
    "copies_differ": (
        {**COPIES, GATE_A: COPIES[GATE_A] * np.arange(1, E + 1, dtype=np.float32)[:, None, None]},
        {"sidecar": SIDECAR}, "side A of gate in layer 0 is declared shared, and its experts' matrices differ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_servers_file_that_is_not_understood_is_refused_by_name(sites, tmp_path, case):
    tensors, config, message = REFUSED[case]
    folder = write(tmp_path / "adapter", tensors, **config)
    with pytest.raises(AdapterFormatError, match=message) as refused:
        read(folder, sites)
    assert str(folder) in str(refused.value)
