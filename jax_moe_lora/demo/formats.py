"""What each format of quantised weights costs in accuracy: `python -m jax_moe_lora.demo.formats OUT.json`.

No kernel is measured: a weight is replaced by the numbers that its format holds, and the layer and the model are
computed in float32. So the figures are the same on every device, but for the rounding of sums.
"""

import json
import platform
import sys
from collections.abc import Mapping
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_moe_lora.demo.tasks import data_folder, heldout_strings, prompt
from jax_moe_lora.devices import require_device
from jax_moe_lora.files.folders import whole_file
from jax_moe_lora.models.params import ModelParams, leaf_name
from jax_moe_lora.models.quantised.schemes import quantised_formats
from jax_moe_lora.serving.model import Model
from pallas_kernels.ops import Format, dequantise, quantise
from pallas_kernels.quantised.format import FORMATS, int4

HIDDEN, WIDTH, ROWS = 1024, 512, 256
STRINGS = 96
COMPARED: Mapping[str, Format] = {**FORMATS, "int4_g128": int4(128)}
METHOD = (
    "weights: relative Frobenius error of normal weights; layer: of the output of one gated expert "
    f"[{WIDTH}, {HIDDEN}] of them for {ROWS} normal rows; kl: mean KL divergence, in nats, of the demo model's "
    f"next-token distributions from those with its float32 weights, over the answers to {STRINGS} held-out strings, "
    "experts, attention and dense MLPs quantised; same: share of these tokens whose most likely one stays. Scales "
    "are in bfloat16 where a format may have any; last blocks of the demo's 48 columns are filled up with zeros"
)


@partial(jax.jit, static_argnames="format")
def rounded(weight: Float[Array, "*lead out in"], format: Format) -> Float[Array, "*lead out in"]:
    """The numbers that a format has for a weight; columns are filled up with zeros to a multiple of 128.

    Args:
      weight: floating point.
      format: the format.
    """
    columns = weight.shape[-1]
    padded = jnp.pad(weight, [(0, 0)] * (weight.ndim - 1) + [(0, -columns % 128)])
    return dequantise(quantise(padded, format, jnp.bfloat16), jnp.float32)[..., :columns]


def layer_errors(format: Format) -> dict[str, float]:
    """Relative errors of normal weights, and of the output of an expert of them.

    Args:
      format: of its three matrices.
    """
    random = np.random.default_rng(0)
    x = random.standard_normal((ROWS, HIDDEN))
    shapes = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    weights = [random.standard_normal(shape, np.float32) * shape[1] ** -0.5 for shape in shapes]
    changed = [np.asarray(rounded(jnp.asarray(weight), format)) for weight in weights]
    together = [np.concatenate([matrix.reshape(-1) for matrix in matrices]) for matrices in (changed, weights)]
    return {"weights": _relative(*together), "layer": _relative(_expert(x, changed), _expert(x, weights))}


def _expert(x: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
    gate, up, down = (weight.astype(np.float64) for weight in weights)
    inner = x @ gate.T
    return (inner / (1 + np.exp(-inner)) * (x @ up.T)) @ down.T


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


class DemoModel:
    """The demo model, its weights in one format after the other."""

    def __init__(self) -> None:
        self._model = Model.from_pretrained(data_folder() / "model", dtype="float32", max_adapters=1)
        self._params: ModelParams = self._model.params
        texts = heldout_strings(STRINGS)
        tokens = [self._model.tokenizer.encode_prompt(prompt(text) + text) for text in texts]
        self._lengths = [len(row) for row in tokens]
        self._tokens = np.array([[*row, *[0] * (max(self._lengths) - len(row))] for row in tokens])
        starts = [len(row) - len(text) - 1 for row, text in zip(tokens, texts, strict=True)]  # at the separator
        place = np.arange(self._tokens.shape[1])
        self._counted = (place >= np.array(starts)[:, None]) & (place < np.array(self._lengths)[:, None])
        self._expected = self._log_probabilities()

    def compare(self, format: Format) -> dict[str, float]:
        """How far its predictions move when its weights are in a format.

        Args:
          format: the format.
        """
        paths = quantised_formats(self._model.config, "fp8", "The demo model")
        pairs, tree = jax.tree_util.tree_flatten_with_path(self._params)
        leaves = [rounded(leaf, format) if ".".join(map(leaf_name, path)) in paths else leaf for path, leaf in pairs]
        self._model.params = jax.tree_util.tree_unflatten(tree, leaves)
        found, expected = self._log_probabilities(), self._expected
        kl = (np.exp(expected) * (expected - found)).sum(-1)
        same = found.argmax(-1) == expected.argmax(-1)
        return {"kl": float(kl[self._counted].mean()), "same": float(same[self._counted].mean())}

    def _log_probabilities(self) -> np.ndarray:
        logits = np.asarray(self._model.logits(self._tokens, lengths=self._lengths), np.float64)
        return np.asarray(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))


def bits_per_weight(format: Format) -> float:
    """Bits of a value with its share of scales, of a matrix of 1024 columns.

    Args:
      format: the format.
    """
    weight = quantise(jnp.ones((1024, 1024)), format, jnp.bfloat16)
    return 8 * weight.nbytes / 2**20


def measure() -> dict[str, Any]:
    """All figures, with where and how they were made."""
    demo = DemoModel()
    rows = []
    for name, format in COMPARED.items():
        figures = layer_errors(format) | demo.compare(format)
        exact = {key: float(f"{value:.3g}") for key, value in figures.items()}
        rows.append({"format": name, "bits": round(bits_per_weight(format), 2)} | exact)
    kind = require_device().device_kind
    device = f"{platform.machine()} CPU" if kind == "cpu" else kind
    head = {"device": device, "date": date.today().isoformat(), "method": METHOD}
    return head | {"versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "numpy")}, "rows": rows}


if __name__ == "__main__":
    whole_file(Path(sys.argv[1]), json.dumps(measure(), indent=1) + "\n")
