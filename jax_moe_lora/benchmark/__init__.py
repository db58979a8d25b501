"""Benchmarks: the routed layer (`layer`), and unrolled against scanned layers (`scan`)."""
