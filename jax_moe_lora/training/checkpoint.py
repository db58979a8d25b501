"""Checkpoints of a run, by orbax: the whole state, the step, and the settings that the run was started with.

A complete checkpoint is renamed to its final name in one step, so a process may die at any moment. The last two are
kept. Arrays are restored bit for bit.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as orbax

from jax_moe_lora.errors import CheckpointError, InputError
from jax_moe_lora.models.params import ModelParams
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.training.step import TrainState

KEPT = 2
_SHOWN = 5  # differing settings that a message quotes


class Checkpoints:
    """The checkpoints of one run; a context manager.

    Attributes:
      folder: where they are.
    """

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        options = orbax.CheckpointManagerOptions(
            max_to_keep=KEPT, enable_async_checkpointing=False, cleanup_tmp_directories=True, create=True
        )
        self._manager = orbax.CheckpointManager(self.folder, options=options, item_names=("state", "settings"))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, settings: Mapping[str, Any]) -> None:
        """Writes a checkpoint, and returns once it is complete.

        Args:
          step: steps that are done. An earlier checkpoint of the same step is kept.
          state: what training changes.
          settings: what the run was started with.
        """
        if step != self.latest:
            items = {"state": orbax.args.StandardSave(_by_key(state)), "settings": orbax.args.JsonSave(dict(settings))}
            self._manager.save(step, args=orbax.args.Composite(**items))

    def restore(self, like: TrainState, settings: Mapping[str, Any]) -> tuple[int, TrainState] | None:
        """The step and state of the newest checkpoint; None where there is no checkpoint.

        Args:
          like: a state of the same shapes, on the devices where the restored one is to be.
          settings: those of this run.

        Raises:
          InputError: the run was started with other settings.
          CheckpointError: the checkpoint cannot be read.
        """
        step = self.latest
        if step is None:
            return None
        self._check(self._read(step, settings=orbax.args.JsonRestore()), settings)
        expected = {
            key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for key, leaf in _by_key(like).items()
        }
        saved = self._read(step, state=orbax.args.StandardRestore(expected))
        return step, jax.tree.unflatten(jax.tree.structure(like), [saved[key] for key in expected])

    def _read(self, step: int, **item: Any) -> Any:
        (name,) = item
        try:
            return self._manager.restore(step, args=orbax.args.Composite(**item))[name]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"The checkpoint {self.folder / str(step)} cannot be read: {error}; remove it to continue from the one "
                "before it.",
                file=self.folder / str(step),
            ) from error

    def _check(self, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        now = _flat(json.loads(json.dumps(settings)))
        before = _flat(saved)
        differ = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if differ:
            said = [f"{key} was {before.get(key, 'none')!r} and is {now.get(key, 'none')!r}" for key in differ]
            more = f", and {len(differ) - _SHOWN} more differ" if len(differ) > _SHOWN else ""
            raise InputError(
                f"The run in {self.folder.parent} was started with other settings: {'; '.join(said[:_SHOWN])}{more}. "
                "Resume it with the same settings, or name a new folder."
            )


def model_settings(config: ModelConfig, params: ModelParams) -> dict[str, Any]:
    """What tells the frozen model of a run from others.

    Args:
      config: the model's.
      params: its weights.
    """
    return {"config": asdict(config), "weights": sampled_digest(params), "dtype": str(params.embedding.dtype)}


def _by_key(state: TrainState) -> dict[str, jax.Array]:
    """Leaves by their path, such as `params.sql.0.gate_up.a`, whatever classes an optimizer's state has."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def sampled_digest(params: Any) -> str:
    """SHA-256 of some values of every array of a tree, which tells weights apart; reading all would take minutes."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        sha.update(np.asarray(_sample(leaf)).tobytes())
    return sha.hexdigest()


@jax.jit
def _sample(leaf: jax.Array) -> jax.Array:
    """Some values, found by an index per axis: no device of a mesh needs the whole array."""
    flat = np.arange(0, leaf.size, max(1, leaf.size // 256))
    return leaf[np.unravel_index(flat, leaf.shape)]
