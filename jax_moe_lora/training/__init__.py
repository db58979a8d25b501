"""Training many adapters at once on a frozen base.

`spec.py`: what an adapter trains. `adapters.py`: its parameters, from and to adapter files. `batch.py`: what a step
reads. `training_bank.py`: the parameters of all adapters as pages, made inside the step. `loss.py`, `evaluation.py`:
losses by slot. `step.py`: one update of every adapter.

Around it, `trainer.py`: from data files to adapter folders. `recipe.py`: rates and schedules. `data.py`, `rows.py`:
examples and batches. `checkpoint.py`, `run_folder.py`, `log.py`: what a run keeps. `scoring.py`: exact answers.
"""

from jax_moe_lora.training.adapters import Params, from_adapter, init_params, to_adapter
from jax_moe_lora.training.batch import Batch
from jax_moe_lora.training.evaluation import Losses, make_evaluation
from jax_moe_lora.training.log import Progress
from jax_moe_lora.training.recipe import Recipe
from jax_moe_lora.training.scoring import Evaluation
from jax_moe_lora.training.spec import AdapterSpec
from jax_moe_lora.training.step import Metrics, TrainState, init_state, make_step
from jax_moe_lora.training.trainer import Trainer

__all__ = [
    "AdapterSpec",
    "Batch",
    "Evaluation",
    "Losses",
    "Metrics",
    "Params",
    "Progress",
    "Recipe",
    "TrainState",
    "Trainer",
    "from_adapter",
    "init_params",
    "init_state",
    "make_evaluation",
    "make_step",
    "to_adapter",
]
