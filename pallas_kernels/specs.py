"""Named shapes of real models: the same ones feed tests, tuning and benchmarks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MoEShape:
    """One Mixture-of-Experts layer. E experts, K experts a token, D model width, F expert width."""

    num_experts: int
    top_k: int
    hidden_size: int
    expert_width: int


LAYERS = {
    "qwen3-30b-a3b": MoEShape(128, 8, 2048, 768),
    "olmoe": MoEShape(64, 8, 2048, 1024),
    "mixtral-8x7b": MoEShape(8, 2, 4096, 14336),
    "gpt-oss-20b-like": MoEShape(32, 4, 2880, 2880),
    # Small enough for a CPU to time, with the ratios of the first.
    "qwen3-tiny": MoEShape(128, 8, 256, 96),
    "small": MoEShape(16, 4, 128, 64),
}
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)


@dataclass(frozen=True)
class AdapterMix:
    """Adapters of a benchmark: `slots` of them, of `ranks` in turn; `base_rows` is the part of tokens without one."""

    slots: int = 0
    ranks: tuple[int, ...] = ()
    base_rows: float = 0.0


ADAPTERS = {
    "none": AdapterMix(),
    "s1r16": AdapterMix(1, (16,)),
    "s8r16": AdapterMix(8, (16,)),
    "s8r64": AdapterMix(8, (64,)),
    "s32r16": AdapterMix(32, (16,)),
    "mixed": AdapterMix(8, (4, 8, 16, 16, 32, 32, 64, 64), 0.5),
}
