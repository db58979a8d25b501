"""Training many adapters at once on a frozen base model.

The step: `spec.py` says what an adapter trains, and `adapters.py` makes its parameters. `batch.py` has the arrays that
a step reads. `training_bank.py` turns the parameters of all adapters into pages inside the step. `loss.py`, `head.py`
and `evaluation.py` compute losses by slot, and `step.py` updates every adapter once. `layout.py` says where its arrays
lie on a mesh.

The data: `forms.py` knows the forms of lines, and `examples.py` turns lines into token ids. `data.py` and `sources.py`
read files, and `rows.py` lays examples out in batches.

The run: `trainer.py` goes from data files to adapter folders, with `checks.py` (its arguments), `recipe.py` (rates and
schedules), `start.py` (first parameters), `scoring.py` (exact answers), and what a run keeps and shows:
`checkpoint.py`, `run_folder.py`, `log.py` and `trackers.py`.
"""

from jax_moe_lora.training.adapters import Params, from_adapter, init_params, to_adapter
from jax_moe_lora.training.batch import Batch
from jax_moe_lora.training.evaluation import Losses, make_evaluation
from jax_moe_lora.training.layout import StepLayout, step_layout
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
    "StepLayout",
    "TrainState",
    "Trainer",
    "from_adapter",
    "init_params",
    "init_state",
    "make_evaluation",
    "make_step",
    "step_layout",
    "to_adapter",
]
