"""Copies of the base model's embeddings beside an adapter's weights: equal ones are passed over, others are refused.

Whole modules that were trained stand under the same names, and the config names them (`saved_modules.py`). PEFT saves
copies with `save_embedding_layers`, which is on where a config names the embeddings or the vocabulary's size
was changed: `base_model.model.model.embed_tokens.weight`, `base_model.model.lm_head.weight`, `.base_layer` or
`.token_adapter.base_layer` between.
"""

import math
import re
from collections.abc import Iterable, Mapping, Set
from contextlib import ExitStack

import numpy as np

from jax_moe_lora.adapters.formats.base_checkpoint import EMBEDDING_WEIGHT, HEAD_WEIGHT, BaseCheckpoint, stored_name
from jax_moe_lora.adapters.formats.names import plain_key
from jax_moe_lora.adapters.formats.problems import Problems
from jax_moe_lora.adapters.formats.weights import AdapterTensors
from jax_moe_lora.errors import AdapterFormatError
from jax_moe_lora.files.safetensors_header import TensorInfo
from jax_moe_lora.files.safetensors_io import TensorFile
from jax_moe_lora.files.sizes import format_bytes

_COPY = re.compile(
    r"base_model\.model\.(?:model\.)?(?P<module>embed_tokens|lm_head)"
    r"(?P<wrapped>(?:\.token_adapter)?(?:\.base_layer)?)\.weight"
)
_PATHS = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
# A tied head is the embeddings, and has no tensor of its own.
_BASE_NAMES = {"model.embed_tokens": (EMBEDDING_WEIGHT,), "lm_head": (HEAD_WEIGHT, EMBEDDING_WEIGHT)}
_PIECE_VALUES = 4 * 2**20


def without_copies(infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors that are no copies of embeddings."""
    return {key: info for key, info in infos.items() if not _COPY.fullmatch(plain_key(key))}


def saved_keys(infos: Iterable[str], modules: Set[str]) -> dict[str, list[str]]:
    """Path of a module that is saved as a whole -> the keys of its tensor; a path without one is left out.

    Args:
      infos: the tensors of a file.
      modules: the paths that the config saves.
    """
    keys: dict[str, list[str]] = {}
    for key in infos:
        match = _COPY.fullmatch(plain_key(key))
        if match and not match["wrapped"] and (path := _PATHS[match["module"]]) in modules:
            keys.setdefault(path, []).append(key)
    return keys


def check_copies(tensors: AdapterTensors, saved: Set[str], base: BaseCheckpoint | None, problems: Problems) -> None:
    """Compares every copy with the base model's own tensor, a piece at a time.

    Args:
      tensors: the adapter's weights.
      saved: paths of modules that the config saves as a whole, whose tensors are no copies.
      base: the base model's checkpoint; None where only its config is known.
      problems: what becomes of a problem.

    Raises:
      AdapterFormatError: a copy differs, or the base model's weights are not there to compare with, by name.
    """
    trained = {key for keys in saved_keys(tensors.files, saved).values() for key in keys}
    matches = {key: match for key in tensors.files if (match := _COPY.fullmatch(plain_key(key)))}
    copies = {key: _PATHS[match["module"]] for key, match in matches.items() if key not in trained}
    if not copies:
        return
    with ExitStack() as opened:
        base_files: Mapping[str, TensorFile] = {}
        with problems:
            base_files = {} if base is None else base.open(opened)
        for key, path in copies.items():
            with problems:
                name = _base_tensor(base_files, path)
                if name is None:
                    advice = "give the folder of the base model's checkpoint to compare it with"
                    raise _refusal(tensors, key, "may be a copy of the base model's embeddings", "a copy", advice)
                _compare(tensors, key, base_files[name], name)


def _base_tensor(base_files: Mapping[str, TensorFile], path: str) -> str | None:
    """The base model's own tensor; None where it is not there."""
    return next(filter(None, (stored_name(base_files, name) for name in _BASE_NAMES[path])), None)


def _size(info: TensorInfo) -> str:
    return f"{format_bytes(info.nbytes)} ({' * '.join(map(str, info.shape))} values in {info.dtype})"


def _compare(tensors: AdapterTensors, key: str, base: TensorFile, name: str) -> None:
    info, base_info = tensors.files[key].infos[key], base.infos[name]
    if info.shape != base_info.shape:
        raise _refusal(
            tensors, key, f"has shape {list(info.shape)}, and {name} {list(base_info.shape)}", "other values"
        )
    if (row := _differing_row(tensors, key, base, name)) is not None:
        raise _refusal(tensors, key, f"differs from {name} of the base model, in row {row} first", "other values")


def equals_base(tensors: AdapterTensors, key: str, path: str, base_files: Mapping[str, TensorFile]) -> bool:
    """Whether a tensor is the base model's own, in the dtype that the adapter has it in.

    Args:
      tensors: the adapter's weights.
      key: the tensor.
      path: the module that it is the weight of.
      base_files: tensor of the base model -> the file that holds it; empty where there are none to compare with.
    """
    name = _base_tensor(base_files, path)
    if name is None or tensors.files[key].infos[key].shape != base_files[name].infos[name].shape:
        return False
    return _differing_row(tensors, key, base_files[name], name) is None


def _differing_row(tensors: AdapterTensors, key: str, base: TensorFile, name: str) -> int | None:
    """The first row that differs from the base model's; None where all are equal."""
    info = tensors.files[key].infos[key]
    count = math.prod(info.shape)
    for begin in range(0, count, _PIECE_VALUES):
        piece = (min(_PIECE_VALUES, count - begin),)
        copied, expected = (
            file.get_values(tensor, begin, piece) for file, tensor in ((tensors.files[key], key), (base, name))
        )
        with np.errstate(over="ignore"):
            # A copy has the dtype that the base was trained in, which may be narrower or wider than its file's.
            differs = expected.astype(copied.dtype) != copied
        if differs.any():
            return (begin + int(differs.argmax())) // info.shape[-1]
    return None


def _refusal(
    tensors: AdapterTensors,
    key: str,
    problem: str,
    found: str,
    advice: str = "",
) -> AdapterFormatError:
    if not advice:
        size = _size(tensors.files[key].infos[key])
        advice = (
            f"it would take {size} of a bank, and the config does not say that it was trained: name it in "
            "modules_to_save, train LoRA on it (target_modules), or some tokens' rows (trainable_token_indices)"
        )
    path, expected = tensors.files[key].path, "an equal copy of the base model's tensor, or none"
    return AdapterFormatError(f"{path}: {key} {problem}; {advice}.", file=path, key=key, found=found, expected=expected)
