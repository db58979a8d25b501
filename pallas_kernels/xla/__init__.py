"""What the XLA backends share: matmuls and the loop over tiles."""
