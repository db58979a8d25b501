"""PEFT's trained tokens: rows of the embedding that an adapter replaces by its own, read as LoRA on the vocabulary.

The config's `trainable_token_indices` has the token ids, the file the new rows `[n, D]` in the order of the ids. With
`new - base` the difference of the rows, replacing them is exactly a LoRA of rank n and scale 1:

    embedding:  A = one-hot(ids) [n, V]    B = (new - base).T [D, n]
    head:       A = new - base   [n, D]    B = one-hot(ids).T [V, n]

Where the base model ties the two, rows of the embedding are those of the head too, unless the config has other ids for
the head. LoRA on the same module is added to the replaced rows: its ranks stand before those of the tokens.

Source of the conventions: peft 0.21, `utils/other.py` (set_additional_trainable_modules), `tuners/trainable_tokens`.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from jax_moe_lora.adapters.formats.adapter_file import OUTSIDE, TOKENS_KEY, AdapterFile, Pair, Weights
from jax_moe_lora.adapters.formats.base_checkpoint import EMBEDDING_WEIGHT, HEAD_WEIGHT, BaseCheckpoint, stored_name
from jax_moe_lora.adapters.formats.names import OUTER_PATHS, plain_key
from jax_moe_lora.adapters.lora import LoRAWeights, uniform
from jax_moe_lora.files.safetensors_header import TensorInfo
from jax_moe_lora.files.safetensors_io import TensorFile

FIELD = "trainable_token_indices"
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"


def token_rows(infos: Mapping[str, TensorInfo]) -> dict[str, Pair]:
    """Module's path -> its rows; the one tensor stands for both sides of the pair, which errors name.

    Args:
      infos: key -> what the file's header says.
    """
    rows = {match["path"]: key for key in infos if (match := TOKENS_KEY.fullmatch(plain_key(key)))}
    return {
        path: Pair(OUTSIDE, path, dict.fromkeys("AB", key), dict.fromkeys("AB", infos[key]))
        for path, key in rows.items()
    }


def add_trained_tokens(
    file: AdapterFile, infos: Mapping[str, TensorInfo], base: BaseCheckpoint | None, weights: Weights
) -> None:
    """Adds the rows of tokens to the weights of embedding and head.

    Args:
      file: what it says and what has been read of it.
      infos: key -> what the file's header says.
      base: whose rows are replaced; None where only its config is known.
      weights: is added to.

    Raises:
      AdapterFormatError: rows without ids or ids without rows, an id that the model lacks, rows of another shape, or
        no base model's rows to compare with, by name.
    """
    rows = token_rows(infos)
    if FIELD in file.config.malformed or not (rows or file.config.token_ids):
        return
    with file.problems, ExitStack() as opened:
        sources = _sources(file, rows, base)
        for path, source in sources.items():  # first, since a base model would not help where there is no room for them
            file.outer_site(rows[source], OUTER_PATHS[path])
        base_files = _open_base(file, next(iter(rows.values())), base, opened)
        for path, source in sources.items():
            with file.problems:
                name = HEAD_WEIGHT if path == _HEAD and not (base and base.tied) else EMBEDDING_WEIGHT
                name = stored_name(base_files, name) or name
                ids = file.config.token_ids[source]
                _add(file, rows[source], OUTER_PATHS[path], ids, base_files.get(name), name, weights)


def _sources(file: AdapterFile, rows: Mapping[str, Pair], base: BaseCheckpoint | None) -> dict[str, str]:
    """Module's path -> the path whose rows it takes."""
    config = file.config
    ids, sources = config.token_ids, {path: path for path in config.token_ids}
    if base is not None and base.tied and _EMBEDDING in ids:
        if ids.get(_HEAD, ids[_EMBEDDING]) == ids[_EMBEDDING]:
            sources[_HEAD] = _EMBEDDING
        elif config.raw.get("ensure_weight_tying"):
            why = f"{FIELD} has other ids for lm_head than for embed_tokens, and ensure_weight_tying ties them"
            raise config.error(why, FIELD, "two lists", "one list of ids")
    for path, source in sources.items():
        if source not in rows:
            why = f"{FIELD} has ids for {path}, and {file.path.name} holds no rows for them"
            raise config.error(why, FIELD, "no rows", f"base_model.model.{path}.token_adapter.trainable_tokens_delta")
    for path, pair in rows.items():
        if path not in sources:
            raise file.error(pair, f"{config.file.name} has no {FIELD} for it", "no ids", "an id for each row")
        if sources[path] != path and file.values:
            one, other = (file.tensors.get_tensor(rows[key].key) for key in (path, sources[path]))
            if one.shape != other.shape or not np.array_equal(one, other):
                why = "the base model ties head and embedding, whose rows differ here; leave the head's out"
                raise file.error(pair, why, "other rows", "the embedding's rows")
    return sources


def _open_base(
    file: AdapterFile, pair: Pair, base: BaseCheckpoint | None, opened: ExitStack
) -> Mapping[str, TensorFile]:
    files = {} if base is None else base.open(opened)
    if not files:
        why = (
            "it replaces rows of the base model's embeddings, and these are not there to compare with; give the folder "
            "of the base model's checkpoint, or load it into a Model that was read from one"
        )
        raise file.error(pair, why, "no rows of the base model", "the base model's checkpoint")
    return files


def _add(
    file: AdapterFile,
    pair: Pair,
    module: str,
    ids: Sequence[int],
    base: TensorFile | None,
    name: str,
    weights: Weights,
) -> None:
    site = file.outer_site(pair, module)
    embedding, (layer,) = module == "embedding", site.layers
    vocabulary, width = (site.in_width, site.out_width) if embedding else (site.out_width, site.in_width)
    if max(ids) >= vocabulary:
        why = f"{FIELD} has {max(ids)}, and the model has the tokens 0 to {vocabulary - 1}"
        raise file.config.error(why, FIELD, str(max(ids)), f"ids below {vocabulary}")
    if pair.shape("A") != (len(ids), width):
        expected = [len(ids), width]
        why = f"it has shape {list(pair.shape('A'))}; expected {expected}, a row for each id of {FIELD}"
        raise file.error(pair, why, list(pair.shape("A")), str(expected))
    if base is None or base.infos[name].shape != (vocabulary, width):
        found = "none" if base is None else list(base.infos[name].shape)
        why = f"it replaces rows of {name} {[vocabulary, width]}; the base model's checkpoint has {found}"
        raise file.error(pair, why, found, str([vocabulary, width]))
    difference, one_hot = _matrices(file, pair, ids, base, name, vocabulary)
    a, b = (one_hot, difference.T) if embedding else (difference, one_hot.T)
    tokens, lora = uniform(a[None], b[None], 1.0, 1), weights.get((layer, module))
    weights[layer, module] = tokens if lora is None else _joined(file, lora, tokens)


def _matrices(
    file: AdapterFile, pair: Pair, ids: Sequence[int], base: TensorFile, name: str, vocabulary: int
) -> tuple[np.ndarray, np.ndarray]:
    """Float32 `new - base` `[n, D]` and the one-hot rows `[n, V]`."""
    count, width = pair.shape("A")
    difference = file.blank((count, width), np.dtype(np.float32))
    one_hot = file.blank((count, vocabulary), np.dtype(np.float32))
    if file.values:
        one_hot[np.arange(count), list(ids)] = 1
        new = file.tensors.get_tensor(pair.key).astype(np.float32)
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused by the bank
            for row, token in enumerate(ids):
                difference[row] = new[row] - base.get_values(name, token * width, (width,)).astype(np.float32)
    return difference, one_hot


def _joined(file: AdapterFile, lora: LoRAWeights, tokens: LoRAWeights) -> LoRAWeights:
    """Both updates as one, with the scale of the first in its B."""
    rank, count = lora.a.shape[1], tokens.a.shape[1]
    a = file.blank((1, rank + count, lora.a.shape[2]), np.dtype(np.float32))
    b = file.blank((1, lora.b.shape[1], rank + count), np.dtype(np.float32))
    if file.values:
        a[:, :rank], a[:, rank:] = lora.a.astype(np.float32), tokens.a
        b[:, :, :rank], b[:, :, rank:] = lora.b.astype(np.float32) * lora.scale[0], tokens.b
    return uniform(a, b, 1.0, 1)
