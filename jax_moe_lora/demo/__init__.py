"""A small Qwen3-MoE model that copies its input, and adapters that change what it answers.

`tasks.py`: the tasks and where the files are; imports no jax. `run.py`: `jax-moe-lora demo`. `train.py`: how the files
were made.
"""

from jax_moe_lora.demo.tasks import TASKS, data_folder, heldout_strings, is_held_out, prompt, random_string

__all__ = ["TASKS", "data_folder", "heldout_strings", "is_held_out", "prompt", "random_string"]
