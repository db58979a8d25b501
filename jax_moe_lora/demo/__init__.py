"""A small Qwen3-MoE that copies its input, and adapters that do something else with it."""
