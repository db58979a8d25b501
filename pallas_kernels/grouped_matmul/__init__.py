"""Grouped matmul: each sorted row times the weight of its expert."""
