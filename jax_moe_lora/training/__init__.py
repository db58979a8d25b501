"""Training many adapters at once on a frozen base.

`spec.py`: what an adapter trains. `adapters.py`: its parameters, from and to adapter files. `batch.py`: what a step
reads. `bank.py`: the parameters of all adapters as pages, made inside the step. `loss.py`, `evaluation.py`: losses by
slot. `step.py`: one update of every adapter.
"""

from jax_moe_lora.training.adapters import Params, from_adapter, init_params, to_adapter
from jax_moe_lora.training.batch import Batch
from jax_moe_lora.training.evaluation import Losses, make_evaluation
from jax_moe_lora.training.spec import AdapterSpec
from jax_moe_lora.training.step import Metrics, TrainState, init_state, make_step

__all__ = [
    "AdapterSpec",
    "Batch",
    "Losses",
    "Metrics",
    "Params",
    "TrainState",
    "from_adapter",
    "init_params",
    "init_state",
    "make_evaluation",
    "make_step",
    "to_adapter",
]
