"""Adapter files of every layout for the tiny Qwen3-MoE, and their logits by another implementation.

Files are written by peft where it writes the layout, else by safetensors as the layout's own system writes it. Expected
logits are those of peft on the same file, or of transformers with the update merged into its weights.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from jax_moe_lora.adapters.formats.names import AdapterNames
from support.models import ADAPTER_NAMES, MIXTRAL_NAMES
from support.networks import EXPERTS, QWEN, TINY, load_peft, peft_logits, save_random_adapter, split_to_per_expert

D, F, E = ({**TINY, **QWEN}[size] for size in ("hidden_size", "moe_intermediate_size", "num_experts"))
LAYERS = range(TINY["num_hidden_layers"])
WIDTHS = {"gate": (D, F), "up": (D, F), "down": (F, D)}  # in, out
SHARED_OUTER = {("gate", "A"), ("up", "A"), ("down", "B")}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXPERTS_PATH = "base_model.model.model.layers.{}.mlp.experts"
TINKER = {"gate": "w1", "up": "w3", "down": "w2"}
TRTLLM = {"gate": "moe_h_to_4h", "up": "moe_gate", "down": "moe_4h_to_h"}
SIDECAR = {"version": 1, "moe_shared_outer": {TRTLLM[m]: {"shared_side": side} for m, side in sorted(SHARED_OUTER)}}
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
        import torch
        from transformers import Qwen3MoeForCausalLM

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


def by_peft(base: Path, folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    return lambda tokens: peft_logits(base, folder, tokens)


def peft(layout: str = "PEFT, 3-D parameters", **config: Any) -> Callable[[Path, Path], Written]:
    def make(base: Path, folder: Path) -> Written:
        save_random_adapter(base, folder, **{"r": 4, "lora_alpha": 6, **config})
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
    return Written(folder, merged_logits(base, deltas), "PEFT, 3-D parameters of peft up to 0.19.0")


def per_expert(base: Path, folder: Path) -> Written:
    source = save_random_adapter(base, folder / "source", r=4, lora_alpha=6, target_parameters=EXPERTS)
    split_to_per_expert(source, folder / "split", E)
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
    return replace(source, folder=folder / "mixtral", names=MIXTRAL_NAMES)


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
