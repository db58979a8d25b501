"""What each family is made of and what adapters may target in it, told from its own blocks; needs no jax."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jax_moe_lora.config import CHOICE_BIAS, MoEConfig
from jax_moe_lora.models.families.examples import example
from jax_moe_lora.models.families.family import Family
from jax_moe_lora.models.families.registry import FAMILIES
from jax_moe_lora.models.names import adapter_names
from jax_moe_lora.models.specs.gemma4 import Gemma4Layer
from jax_moe_lora.models.specs.mlp import RoutedMLP
from jax_moe_lora.models.specs.model import ModelConfig

_ROUTERS = {
    "softmax_topk": "softmax, then the best",
    "topk_softmax": "the best, then softmax",
    "sigmoid_bias": "sigmoid",
    "softmax_bias": "softmax",
    "sparsemixer": "SparseMixer",
}
_KINDS = {
    "GQA": "grouped-query",
    "MLA": "latent (MLA)",
    "DeltaNet": "gated delta-net",
    "Gemma4Attention": "grouped-query, values normed",
}
_NORMS = {"after": "norms behind the blocks", "both": "norms before and behind the blocks"}


@dataclass(frozen=True)
class FamilySummary:
    """One family.

    Attributes:
      model_type: in `config.json`.
      wrappers: the `model_type` of multimodal configs whose text part it is.
      attention: kinds of layers, by what mixes their tokens.
      router: how experts are chosen and weighted.
      others: what stands beside attention and routed experts.
      targets: modules that adapters may target, as in PEFT's files below a layer; `{q,k}_proj` stands for two.
      refuses: what its configs may say and is refused; unknown fields are refused everywhere.
    """

    model_type: str
    wrappers: tuple[str, ...]
    attention: tuple[str, ...]
    router: str
    others: tuple[str, ...]
    targets: tuple[str, ...]
    refuses: str


def summaries() -> tuple[FamilySummary, ...]:
    """All families, in the order in which they are registered."""
    return tuple(summary(one) for one in FAMILIES.values())


def summary(of: Family) -> FamilySummary:
    """What a family's example config is read as.

    Args:
      of: the family.
    """
    config = of.read_config(example(of.model_type), None, of.model_type)
    return FamilySummary(
        of.model_type,
        of.wrappers,
        _unique(_attention(layer.attention) for layer in config.layers),
        _router(config.moe, next(layer.mlp for layer in config.layers if isinstance(layer.mlp, RoutedMLP))),
        _unique(_others(config)),
        _targets(config, of),
        of.refuses,
    )


def _attention(spec: Any) -> str:
    """The kind of a layer's attention, and what of it not all have."""
    kind = _KINDS.get(type(spec).__name__) or (type(spec).__doc__ or "").splitlines()[0].rstrip(".")
    spec = getattr(spec, "heads", spec)
    rope, biases = getattr(spec, "rope", None), getattr(spec, "biases", "")
    words = {
        "window": getattr(spec, "window", None) is not None,
        "no positions": hasattr(spec, "rope") and rope is None,
        "neighbours turned together": bool(getattr(rope, "interleaved", False)),
        "a part of each head turned": bool(getattr(rope, "rotary_dim", None)),
        "sinks": bool(getattr(spec, "sinks", False)),
        "output gate": bool(getattr(spec, "gate", None)),
        f"norm of q and k by {getattr(spec, 'qk_norm', '')}": bool(getattr(spec, "qk_norm", None)),
        f"biases of {', '.join(biases)}" if isinstance(biases, str) else "biases": bool(biases),
    }
    return ": ".join(part for part in (kind, ", ".join(word for word, here in words.items() if here)) if part)


def _router(moe: MoEConfig, spec: RoutedMLP) -> str:
    words = [_ROUTERS.get(moe.router, moe.router)]
    words += ["a bias for the choice"] if moe.router in CHOICE_BIAS else []
    words += ["a bias"] if spec.router_bias else []
    words += ["groups"] if getattr(moe, "num_groups", 1) > 1 else []
    words += ["renormalised"] if moe.renormalize else []
    words += [f"times {moe.scaling:g}"] if moe.scaling != 1 else []
    return ", ".join(words)


def _others(config: ModelConfig) -> Iterable[str]:
    for layer in config.layers:
        if not isinstance(layer.mlp, RoutedMLP):
            yield "dense layers"
        elif layer.mlp.shared is not None:
            yield "shared expert with a gate" if layer.mlp.shared_gate else "shared expert"
        if isinstance(layer, Gemma4Layer):
            yield "a dense MLP beside the experts"
            continue
        if layer.norms in _NORMS:
            yield _NORMS[layer.norms]
        if layer.norm.kind == "layer":
            yield "layer norms"
        if layer.residual_scale != 1:
            yield "scaled residuals"
    if config.embedding_scale != 1:
        yield "scaled embeddings"
    if config.logit_scale != 1 or config.logit_softcap is not None:
        yield "scaled logits"
    if config.head_bias:
        yield "a bias of the head"


def _targets(config: ModelConfig, of: Family) -> tuple[str, ...]:
    names = adapter_names(config)
    dense = _unique(names.dense_path(module) for module in names.dense.values())
    return _grouped((*dense, *(f"{of.experts_path}.{part}" for part in ("gate_up_proj", "down_proj"))))


def _grouped(paths: Iterable[str]) -> tuple[str, ...]:
    """Paths that differ in the word before `_proj` alone, as one."""
    words: dict[str, list[str]] = {}
    for path in paths:
        parent, _, last = path.rpartition(".")
        word = last.removesuffix("_proj")
        words.setdefault(f"{parent}.{{}}_proj" if word != last else path, []).append(word)
    return tuple(
        form.replace("{}", word[0] if len(word) == 1 else f"{{{','.join(word)}}}") for form, word in words.items()
    )


def _unique(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(words))
