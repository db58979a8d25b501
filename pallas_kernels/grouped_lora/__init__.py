"""Grouped LoRA: each sorted row's adapter added to it, through paged A and B matrices."""
