"""Benchmarks of the routed layer, of whole models, of training and of loading adapters.

`sweep.py`: the layer over shapes, adapters and tokens, beside the peers of `peers.py`. `tune.py`: configs of the Hopper
kernels. `model.py`: decode steps and prefills. `train.py`: training steps. `load.py`: loading an adapter. `scan.py`:
unrolled and scanned layers. `ceilings.py`: what the device can do at most. `report.py`, `plots.py`: what is written.
"""
