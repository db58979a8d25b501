"""Copies of the base model's embeddings beside an adapter's weights: equal ones are passed over, others are refused.

PEFT saves them with `save_embedding_layers`, which is on where a config names the embeddings or the vocabulary's size
was changed: `base_model.model.model.embed_tokens.weight`, `base_model.model.lm_head.weight`, `.base_layer` or
`.token_adapter.base_layer` between.
"""

import math
import re
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from jax_moe_lora.adapters.formats.base_checkpoint import EMBEDDING_WEIGHT, HEAD_WEIGHT, BaseCheckpoint, stored_name
from jax_moe_lora.adapters.formats.names import plain_key
from jax_moe_lora.adapters.formats.problems import Problems
from jax_moe_lora.adapters.formats.weights import AdapterTensors, open_weights
from jax_moe_lora.errors import AdapterFormatError
from jax_moe_lora.files.safetensors_header import TensorInfo
from jax_moe_lora.files.safetensors_io import TensorFile
from jax_moe_lora.files.sizes import format_bytes

_COPY = re.compile(
    r"base_model\.model\.(?:model\.)?(?P<module>embed_tokens|lm_head)(?:\.token_adapter)?(?:\.base_layer)?\.weight"
)
# A tied head is the embeddings, and has no tensor of its own.
_BASE_NAMES = {
    "embed_tokens": (EMBEDDING_WEIGHT,),
    "lm_head": (HEAD_WEIGHT, EMBEDDING_WEIGHT),
}
_PIECE_VALUES = 4 * 2**20


def without_copies(infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors that are no copies of embeddings."""
    return {key: info for key, info in infos.items() if not _COPY.fullmatch(plain_key(key))}


def check_copies(tensors: AdapterTensors, base: BaseCheckpoint | None, problems: Problems) -> None:
    """Compares every copy with the base model's own tensor, a piece at a time.

    Args:
      tensors: the adapter's weights.
      base: the base model's checkpoint; None where only its config is known.
      problems: what becomes of a problem.

    Raises:
      AdapterFormatError: a copy differs, or the base model's weights are not there to compare with, by name.
    """
    copies = {key: match["module"] for key in tensors.files if (match := _COPY.fullmatch(plain_key(key)))}
    if not copies:
        return
    with ExitStack() as opened:
        base_files: Mapping[str, TensorFile] = {}
        with problems:
            base_files = {} if base is None else base.open(opened)
        for key, module in copies.items():
            with problems:
                name = next(filter(None, (stored_name(base_files, name) for name in _BASE_NAMES[module])), None)
                if name is None:
                    advice = "give the folder of the base model's checkpoint to compare it with"
                    raise _refusal(tensors, key, "may be a copy of the base model's embeddings", "a copy", advice)
                _compare(tensors, key, base_files[name], name)


def sizes_of_copies(folder: Path) -> str:
    """What whole embeddings in an adapter's file would take of a bank, to end a sentence; empty where it has none.

    Args:
      folder: the adapter's.
    """
    with suppress(AdapterFormatError), open_weights(folder) as tensors:
        copies = {
            match["module"]: info for key, info in tensors.infos.items() if (match := _COPY.fullmatch(plain_key(key)))
        }
        return "".join(f"; {module} alone would take {_size(info)} of every slot" for module, info in copies.items())
    return ""


def _size(info: TensorInfo) -> str:
    return f"{format_bytes(info.nbytes)} ({' * '.join(map(str, info.shape))} values in {info.dtype})"


def _compare(tensors: AdapterTensors, key: str, base: TensorFile, name: str) -> None:
    info, base_info = tensors.files[key].infos[key], base.infos[name]
    if info.shape != base_info.shape:
        raise _refusal(
            tensors, key, f"has shape {list(info.shape)}, and {name} {list(base_info.shape)}", "other values"
        )
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
            row = (begin + int(differs.argmax())) // info.shape[-1]
            raise _refusal(tensors, key, f"differs from {name} of the base model, in row {row} first", "other values")


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
            f"adapters with embeddings of their own are not supported, and would take {size} of every slot: train LoRA "
            "on them (target_modules), or some tokens' rows (trainable_token_indices)"
        )
    path, expected = tensors.files[key].path, "an equal copy of the base model's tensor, or none"
    return AdapterFormatError(f"{path}: {key} {problem}; {advice}.", file=path, key=key, found=found, expected=expected)
