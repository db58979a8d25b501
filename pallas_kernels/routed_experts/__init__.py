"""The routed experts of a layer as one differentiable op."""
