"""Quantised weights: what they are, and how they are dequantised."""
