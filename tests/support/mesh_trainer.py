"""A trainer on one device and on a mesh: the adapters that it writes, evaluation, and a run that is resumed."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np

from jax_moe_lora import InputError, demo, read_adapter
from jax_moe_lora.training import AdapterSpec, Recipe, Trainer
from support.checkpoints import write
from support.meshes import relative, report

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "head_dim": 4,
    "eos_token_id": 2,
}
LINES = [{"prompt": f"{text}>", "completion": text.upper()} for text in ("ab", "xyz", "jkl", "mnop", "qq")]
RECIPE = Recipe(AdapterSpec(4, targets=("gate", "up", "down", "q", "o")), learning_rate=1e-2)


def make(model: Path, mesh: str | None, batch_size: int = 4) -> Trainer:
    data, sizes = {"x": LINES, "y": LINES[2:]}, {"sequence_length": 16, "dtype": "float32"}
    evaluation = {"x": LINES[:3]}
    return Trainer(
        model, data, steps=3, recipe=RECIPE, evaluation=evaluation, mesh=mesh, batch_size=batch_size, **sizes
    )


def matrices(folder: Path, model: Path) -> list[np.ndarray]:
    weights = [read_adapter(folder / name, model).weights for name in ("x", "y")]
    return [matrix for own in weights for _, found in sorted(own.items()) for matrix in (found.a, found.b)]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["adapters"][name]["loss"] for line in lines if "adapters" in line for name in ("x", "y")]


def refused(model: Path, *arguments) -> str:
    try:
        make(model, *arguments)
    except InputError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    folder, mesh = Path(sys.argv[1]), sys.argv[2]
    model = folder / "model"
    write(model, **SIZES)
    shutil.copy(demo.data_folder() / "model" / "tokenizer.json", model)
    one, split, again = make(model, None), make(model, mesh), make(model, mesh)
    one.run(folder / "one")
    split.run(folder / "split")
    bits = [leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(split.state))]
    again.run(folder / "split", resume=True)
    try:
        make(model, "expert=2").run(folder / "split", resume=True)
    except InputError as error:
        other_mesh = str(error)
    wanted, found = matrices(folder / "one", model), matrices(folder / "split", model)
    report(
        adapters=max(relative(x, y) for x, y in zip(found, wanted, strict=True)),
        losses=relative(losses(folder / "split"), losses(folder / "one")),
        evaluated=relative(split.evaluate()["x"].loss, one.evaluate()["x"].loss),
        resumed=[leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(again.state))] == bits,
        digests=one.settings()["model"] == split.settings()["model"],
        other_mesh=other_mesh,
        rows=refused(model, "data=2", 3),
        experts=refused(model, "expert=8"),
    )
