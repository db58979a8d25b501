"""What the portable kernels share."""
