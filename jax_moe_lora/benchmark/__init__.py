"""Benchmarks: the routed layer and peers (`sweep`), its configs (`tune`), unrolled and scanned layers (`scan`)."""
