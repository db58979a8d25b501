"""Adapters outside of the layers: on the head, and on the embedding.

PEFT: `lm_head.lora_A.weight` `[R, D]` and `.lora_B.weight` `[V, R]`, as any linear projection;
`model.embed_tokens.lora_embedding_A` `[R, V]`, whose columns are looked up by token, and `.lora_embedding_B` `[D, R]`.
Tinker calls the head `model.unembed_tokens`. Where the weights are tied, either one changes its own side alone.

Source of the conventions: peft 0.21, `tuners/lora/layer.py` (Embedding); tinker-cookbook, `weights`.
"""

from collections.abc import Iterable

from jax_moe_lora.adapters.formats.adapter_file import AdapterFile, Pair, Weights
from jax_moe_lora.adapters.formats.names import OUTER_PATHS
from jax_moe_lora.adapters.lora import uniform


def read_outer(file: AdapterFile, pairs: Iterable[Pair], weights: Weights) -> None:
    """Adds the weights of head and embedding.

    Args:
      file: what it says and what has been read of it.
      pairs: those outside of the layers.
      weights: is added to.
    """
    for pair in pairs:
        with file.problems:
            _check_tying(file, pair)
            module = OUTER_PATHS[pair.path]
            if module in {OUTER_PATHS[path] for path in file.config.saved_modules}:
                why = f"modules_to_save replaces the whole {module}, and PEFT puts no LoRA on it then"
                raise file.error(pair, why, "both", "one of the two")
            (layer,) = file.outer_site(pair, module).layers
            if (layer, module) in weights:
                raise file.duplicate(pair, module)
            if file.two_dimensional(pair):
                site, rank = file.sites[module], pair.shape("A")[0]
                names = [pair.path, *(path for path, named in OUTER_PATHS.items() if named == module)]
                names += [name.rpartition(".")[2] for name in names]
                scale = file.scale(pair, rank, file.config.targets_module, *names)
                a, b = file.load(pair, [(rank, site.in_width)], [(site.out_width, rank)])
                weights[layer, module] = uniform(a[None], b[None], scale, 1)


def _check_tying(file: AdapterFile, pair: Pair) -> None:
    """Refuses an adapter whose other side PEFT would make from this one when it loads the file."""
    if file.config.raw.get("ensure_weight_tying"):
        why = f"{file.config.file.name} sets ensure_weight_tying, and adapters that are tied to each other are not read"
        raise file.error(pair, why, "ensure_weight_tying", "an adapter for each of embedding and head, or for one")
