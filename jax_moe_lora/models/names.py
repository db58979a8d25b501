"""Names of a decoder's projections: in checkpoints, in adapters, and in the parameter tree."""

from jax_moe_lora.adapters.formats.names import AdapterNames
from jax_moe_lora.config import ModelConfig
from jax_moe_lora.models.sites import layer_sites

# Path below `model.layers.L.` -> module, for the families that have it.
ATTENTION = {f"self_attn.{module}_proj": module for module in "qkvo"}
ROUTER = {"mlp.gate": "router"}
DENSE_MLP = {f"mlp.{part}_proj": f"mlp_{part}" for part in ("gate", "up", "down")}
SHARED_EXPERT = {f"mlp.shared_expert.{part}_proj": f"shared_{part}" for part in ("gate", "up", "down")} | {
    "mlp.shared_expert_gate": "shared_expert_gate"
}
# Last part of an expert's path -> module.
EXPERTS = {f"{part}_proj": part for part in ("gate", "up", "down")}

# Module -> its leaf below a layer of the parameter tree.
_LEAVES = (
    {module: f"attention.{module}" for module in "qkvo"}
    | {"router": "mlp.router", "shared_expert_gate": "mlp.shared_expert_gate"}
    | {part: f"mlp.experts.{part}" for part in ("gate", "up", "down")}
    | {f"mlp_{part}": f"mlp.{part}" for part in ("gate", "up", "down")}
    | {f"shared_{part}": f"mlp.shared.{part}" for part in ("gate", "up", "down")}
)


def tensor_names(config: ModelConfig, names: AdapterNames) -> dict[str, str | list[str]]:
    """Path in the parameter tree -> checkpoint tensor, or one tensor an expert where the leaf stacks them."""
    tensor_of: dict[str, str | list[str]] = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight"}
    if not config.tie_embeddings:
        tensor_of["head"] = "lm_head.weight"
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        tensor_of[f"{ours}.attention_norm"] = f"{theirs}.input_layernorm.weight"
        tensor_of[f"{ours}.mlp_norm"] = f"{theirs}.post_attention_layernorm.weight"
        for module in config.attention_biases:
            tensor_of[f"{ours}.attention.{module}_bias"] = f"{theirs}.self_attn.{module}_proj.bias"
        for module in "qk" if config.qk_norm else "":
            tensor_of[f"{ours}.attention.{module}_norm"] = f"{theirs}.self_attn.{module}_norm.weight"
    for (layer, module), stack in projection_tensors(config, names).items():
        tensor_of[f"layers.{layer}.{_LEAVES[module]}"] = stack if module in names.experts.values() else stack[0]
    return tensor_of


def projection_tensors(config: ModelConfig, names: AdapterNames) -> dict[tuple[int, str], list[str]]:
    """(layer, module) of each projection of the layers -> its checkpoint tensors, one per expert."""
    part_of = {module: part for part, module in names.experts.items()}
    tensors: dict[tuple[int, str], list[str]] = {}
    for module, site in layer_sites(config).items():
        for layer in site.layers:
            if module in part_of:
                experts = f"model.layers.{layer}.{names.per_expert_path or names.experts_path}"
                tensors[layer, module] = [f"{experts}.{e}.{part_of[module]}.weight" for e in range(site.num_experts)]
            else:
                tensors[layer, module] = [
                    f"model.layers.{layer}.{names.dense_path(module, in_checkpoints=True)}.weight"
                ]
    return tensors


def outer_tensors(config: ModelConfig) -> dict[str, str]:
    """Embedding and head -> their checkpoint tensors, which are one where they are tied."""
    embedding = "model.embed_tokens.weight"
    return {"embedding": embedding, "head": embedding if config.tie_embeddings else "lm_head.weight"}


def other_names(config: ModelConfig, names: AdapterNames) -> dict[str, str]:
    """Checkpoint tensors that have a second name, which transformers 5 writes -> that name."""
    second: dict[str, str] = {}
    for module in set(names.dense.values()):
        first, written = names.dense_path(module), names.dense_path(module, in_checkpoints=True)
        if first != written:
            for layer in range(config.num_layers):
                second[f"model.layers.{layer}.{written}.weight"] = f"model.layers.{layer}.{first}.weight"
    return second


def unused_names(config: ModelConfig) -> frozenset[str]:
    """Tensors that may stand in a checkpoint and are not read: a tied head, saved all the same."""
    return frozenset({"lm_head.weight"} if config.tie_embeddings else ())
