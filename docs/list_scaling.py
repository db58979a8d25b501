"""Writes the tables of predictions into `docs/scaling.md`: `python docs/list_scaling.py`."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from jax_moe_lora.benchmark.models import model_config
from jax_moe_lora.mesh.scaling import MEASURED_SUMS, Prediction, Workload, predict, rank_meshes, sum_seconds

PAGE = Path(__file__).parent / "scaling.md"
RESULTS = Path(__file__).parent.parent / "pallas_kernels" / "results"
MARK = "<!-- {}: begin (python docs/list_scaling.py) -->", "<!-- {}: end -->"
DECODE = Workload("decode", 128, 2048, 4096)
STEPS = (replace(DECODE, batch=8), DECODE, Workload("prefill", 8, 1024, 4096))
MODELS = {
    "Qwen3-235B-A22B": ("qwen3-235b-a22b", "bfloat16"),
    "DeepSeek-V3": ("deepseek-v3", "bfloat16"),
    "DeepSeek-V3, fp8": ("deepseek-v3", "fp8_block"),
}
ADAPTERS = {"none": (0, False), "8": (8, False), "256": (256, False), "256, shared outer": (256, True)}
GPUS = (8, 64)


def main() -> None:
    """Replaces what stands between the marks of the page."""
    PAGE.write_text(with_tables(PAGE.read_text()))


def with_tables(page: str) -> str:
    """The page with the present predictions."""
    for name, lines in (("predictions", predictions()), ("one", on_one()), ("two", on_two())):
        begin, end = (mark.format(name) for mark in MARK)
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}\n\n{''.join(f'| {" | ".join(line)} |\n' for line in lines)}\n{end}{after}"
    return page


def predictions() -> Iterator[tuple[str, ...]]:
    """The best mesh of each number of GPUs, and its steps."""
    decode = ("decode 8", "decode 128", "of it sums", "prefill 8 x 1024", "tokens/s")
    yield ("model", "GPUs", "adapters", "mesh", *decode, "GB per GPU")
    yield ("---",) * 10
    for title, (name, weights) in MODELS.items():
        config = model_config(name)
        for gpus in GPUS:
            for label, (adapters, shared) in ADAPTERS.items():
                about = {"adapters": adapters, "shared": shared, "weights": weights}
                best = rank_meshes(config, gpus, replace(DECODE, **about))[0]
                yield title, str(gpus), label, *(_cells(config, best, about) if best.fits else _too_large(best))


def _cells(config: Any, best: Prediction, about: dict[str, Any]) -> tuple[str, ...]:
    few, many, prompts = (predict(config, best.mesh_text, replace(step, **about)) for step in STEPS)
    times = (_ms(few.step_s), _ms(many.step_s), _ms(many.sums_s), _ms(prompts.step_s))
    return f"`{best.mesh_text}`", *times, f"{many.tokens_per_s:.0f}", _memory(best)


def _too_large(best: Prediction) -> tuple[str, ...]:
    return "none fits", *[""] * 5, f"{_memory(best)} with `{best.mesh_text}`, of {best.room / 1e9:.0f}"


def _memory(one: Prediction) -> str:
    parts = (one.memory.weights, one.memory.pages, one.memory.cache)
    return f"{' + '.join(f'{part / 1e9:.0f}' for part in parts)} = {one.memory.total / 1e9:.0f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def on_one() -> Iterator[tuple[str, ...]]:
    """Predictions beside the committed results of whole models on one GPU."""
    yield "model", "step", "adapters of rank 16", "predicted", "measured", "predicted / measured"
    yield ("---",) * 6
    for file in ("h200_model.json", "h200_families.json"):
        for row in json.loads((RESULTS / file).read_text())["rows"]:
            if row.get("engine", "jax_moe_lora") == "jax_moe_lora":
                adapters = {"none": 0, "s8r16": 8}[row["adapters"]]
                model = row.get("model", "qwen3-30b-a3b")
                work = Workload(row["kind"], row["batch"], row["length"], adapters=adapters)
                one = predict(model_config(model), "data=1", work, "nvlink")
                step = f"{row['kind']} {row['batch']}" + (f" x {row['length']}" if row["kind"] == "prefill" else "")
                ratio = one.step_s * 1e3 / row["ms"]
                yield model, step, str(adapters), _ms(one.step_s), f"{row['ms']:.1f} ms", f"{ratio:.2f}"


def on_two() -> Iterator[tuple[str, ...]]:
    """Predicted sums beside those measured between two GPUs."""
    yield "bytes of a sum", "predicted", "measured", "predicted / measured"
    yield ("---",) * 4
    for nbytes, measured in MEASURED_SUMS:
        seconds = sum_seconds(nbytes, "tensor=2", "nvlink")
        yield f"{nbytes:,}", f"{seconds * 1e6:.0f} µs", f"{measured * 1e6:.0f} µs", f"{seconds / measured:.2f}"


if __name__ == "__main__":
    main()
