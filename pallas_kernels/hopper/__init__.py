"""What the Hopper kernels share: the ring of stages, counting by comparing, configs."""
