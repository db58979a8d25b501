"""Whole modules saved beside an adapter: PEFT's `modules_to_save`, of which the embedding and the head are served.

The file has the module's own weight `[V, D]`, `base_model.model.lm_head.weight` or `...embed_tokens.weight`, and PEFT
computes with it in place of the base model's: alone, also where the base model ties the two. With
`ensure_weight_tying` and tied weights one matrix is both, and the file has it under both names.

Source of the conventions: peft 0.21, `utils/other.py` (ModulesToSaveWrapper), `tuners/tuners_utils.py`.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from jax_moe_lora.adapters.formats.adapter_file import OUTSIDE, AdapterFile, Pair, Weights
from jax_moe_lora.adapters.formats.base_checkpoint import BaseCheckpoint
from jax_moe_lora.adapters.formats.embedding_copies import equals_base, saved_keys
from jax_moe_lora.adapters.formats.names import OUTER_PATHS
from jax_moe_lora.adapters.formats.weights import AdapterTensors
from jax_moe_lora.files.dtypes import DTYPES

FIELD = "modules_to_save"
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"


def read_saved_modules(
    file: AdapterFile, tensors: AdapterTensors, base: BaseCheckpoint | None, weights: Weights
) -> dict[str, np.ndarray]:
    """The whole matrices that an adapter brings; one that equals the base model's is left out.

    Args:
      file: what it says and what has been read of it.
      tensors: its tensors.
      base: the base model's checkpoint, to compare with; None where only its config is known.
      weights: the adapter's LoRA.

    Returns:
      `embedding` or `head` -> `[V, D]`; one array under both where one matrix is both.

    Raises:
      AdapterFormatError: a module without its tensor, of another shape or dtype, or with LoRA or trained tokens too.
    """
    pairs = _pairs(file, tensors, base)
    replacements: dict[str, np.ndarray] = {}
    for path, pair in pairs.items():
        with file.problems:
            _check(file, pair, OUTER_PATHS[path], weights)
            if not (file.values and _equals_base(tensors, pair.key, path, base)):
                replacements[OUTER_PATHS[path]] = file.tensors.get_tensor(pair.key)
    if file.config.ties_saved_modules and pairs and (base is None or base.tied):
        with file.problems:
            return _tied(file, pairs, base, replacements)
    return replacements


def _pairs(file: AdapterFile, tensors: AdapterTensors, base: BaseCheckpoint | None) -> dict[str, Pair]:
    """Module's path -> its tensor; the one tensor stands for both sides of the pair, which errors name."""
    infos, pairs = tensors.infos, dict[str, Pair]()
    for path, keys in saved_keys(infos, file.config.replaced_modules).items():
        pairs[path] = Pair(OUTSIDE, path, dict.fromkeys("AB", keys[0]), dict.fromkeys("AB", infos[keys[0]]))
        with file.problems:
            if len(keys) > 1:
                raise file.error(pairs[path], f"{keys[1]} holds the {path} too", "two keys", "one key")
    one_is_enough = bool(file.config.ties_saved_modules and pairs and (base is None or base.tied))
    for path in sorted(file.config.saved_modules - pairs.keys()):
        with file.problems:
            if not one_is_enough:
                why = f"{FIELD} names {path}, and {file.path.name} holds no {path}.weight"
                raise file.config.error(why, FIELD, "no such tensor", f"base_model.model.{path}.weight")
    return pairs


def _check(file: AdapterFile, pair: Pair, module: str, weights: Weights) -> None:
    site = file.outer_site(pair, module)
    file.keys[OUTSIDE, module] = pair.key
    expected = (site.in_width, site.out_width) if module == "embedding" else (site.out_width, site.in_width)
    if any(named == module for _, named in weights):
        why = f"{FIELD} replaces the whole {module}, and the file has LoRA or trained tokens for it too"
        raise file.error(pair, why, "both", "one of the two")
    if pair.shape("A") != expected:
        why = f"it has shape {list(pair.shape('A'))}; expected {list(expected)}, as the model's {module}"
        raise file.error(pair, why, list(pair.shape("A")), str(list(expected)))
    if (dtype := pair.infos["A"].dtype) not in DTYPES:
        raise file.error(pair, f"it has dtype {dtype}; expected one of {', '.join(DTYPES)}", dtype, ", ".join(DTYPES))


def _equals_base(tensors: AdapterTensors, key: str, path: str, base: BaseCheckpoint | None) -> bool:
    with ExitStack() as opened:
        return base is not None and equals_base(tensors, key, path, base.open(opened))


def _tied(
    file: AdapterFile, pairs: Mapping[str, Pair], base: BaseCheckpoint | None, replacements: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """One matrix for both modules, which the base model ties, or may tie."""
    pair = pairs.get(_EMBEDDING) or pairs[_HEAD]
    if len(pairs) == 1 and base is None:
        why = "ensure_weight_tying makes it the head's and the embedding's where the base model ties the two, which "
        why += "only its checkpoint tells; give its folder"
        raise file.error(pair, why, "no base model", "the base model's checkpoint")
    if file.values and not _alike(list(replacements.values()), len(pairs)):
        why = "ensure_weight_tying makes it the head's and the embedding's, and the file has other values for the two"
        raise file.error(pair, why, "two matrices", "one")
    for module in ("embedding", "head"):
        file.keys.setdefault((OUTSIDE, module), pair.key)
    return dict.fromkeys(("embedding", "head"), next(iter(replacements.values()))) if replacements else {}


def _alike(matrices: Sequence[np.ndarray], count: int) -> bool:
    """Whether all `count` matrices of a file are one; those that equal the base model's were left out."""
    return not matrices or (len(matrices) == count and all(np.array_equal(matrices[0], other) for other in matrices))
