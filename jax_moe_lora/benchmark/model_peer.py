"""The same model in transformers, without adapters: what a decode step or a prefill takes there."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from jax_moe_lora.benchmark.random_model import Case

REPEATS = 3
METHOD = (
    "transformers: eager torch, random weights, no adapters, grouped_mm experts where the model has them; decode: "
    "`steps` forward passes of one token on a cache that grows; prefill: one pass; only the last logits; median of 3 "
    "after a warm-up"
)


def sweep_transformers(raw: Mapping[str, Any], cases: Sequence[Case], steps: int) -> Iterator[dict[str, Any]]:
    """Measures every case on a CUDA device; at the end its memory is given back.

    Args:
      raw: the model's `config.json`.
      cases: what is timed; their adapters do not matter.
      steps: decode steps per repeat.

    Yields:
      A row per case: milliseconds, and in `paths` the implementations of attention, experts and delta-net that ran.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("grouped_mm")
    for case in cases:
        row = asdict(case) | {"engine": "transformers", "adapters": "none", "layers": config.num_hidden_layers}
        try:
            with torch.inference_mode():
                times = _decode(model, case, steps) if case.kind == "decode" else _prefill(model, case)
            median = statistics.median(times)
            row |= {"ms": round(median * 1e3, 3), "tokens_per_s": round(case.rows / median, 1), "paths": _paths(model)}
        except Exception as error:  # such as out of memory
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        yield row
    del model
    torch.cuda.empty_cache()


def _decode(model: Any, case: Case, steps: int) -> list[float]:
    """Seconds a step."""
    import torch

    tokens = torch.randint(0, model.config.vocab_size, (case.batch, case.length), device="cuda")
    cache = model(tokens, use_cache=True, logits_to_keep=1).past_key_values
    one = tokens[:, :1]

    def run() -> None:
        for _ in range(steps):
            model(one, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return [seconds / steps for seconds in _times(run)]


def _prefill(model: Any, case: Case) -> list[float]:
    import torch

    tokens = torch.randint(0, model.config.vocab_size, (case.batch, case.length), device="cuda")
    return _times(lambda: model(tokens, use_cache=True, logits_to_keep=1))


def _times(run: Callable[[], Any]) -> list[float]:
    import torch

    times = []
    for _ in range(1 + REPEATS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return times[1:]


def _paths(model: Any) -> dict[str, Any]:
    """The implementations that transformers picked; its delta-net is fast only with kernels of other packages."""
    config, module = model.config, sys.modules[type(model).__module__]
    paths = {
        "attention": getattr(config, "_attn_implementation", None),
        "experts": getattr(config, "_experts_implementation", None),
    }
    fast = getattr(module, "is_fast_path_available", None)
    return paths if fast is None else paths | {"delta_net_kernels": bool(fast)}
