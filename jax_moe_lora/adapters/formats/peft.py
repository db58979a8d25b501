"""What PEFT writes: 2-D modules, per-expert 2-D modules, and 3-D expert parameters in both orientations.

Source of the conventions: peft 0.21, `tuners/lora/layer.py` (ParamWrapper) and `tuners/tuners_utils.py`. Unsloth's own
order of B's columns: unslothai/unsloth-zoo, pull requests 1232 and 1269.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jax_moe_lora.adapters.formats.adapter_file import INDEX, AdapterFile, FileLayout, Pair, Weights
from jax_moe_lora.adapters.formats.config_fields import GROUPED_BY_EXPERT
from jax_moe_lora.adapters.lora import LoRAWeights, uniform

# Up to this version PEFT read every 3-D parameter as (E, in, out), and wrote A and B with their roles exchanged.
LAST_TRANSPOSED = (0, 19, 0)
_EXPERT = re.compile(rf"\.({INDEX})\.([^.]+)")
_INNER = ".base_layer"


def read_dense(file: AdapterFile, pair: Pair) -> LoRAWeights:
    """A projection with one matrix: A `[R, in]`, B `[out, R]`.

    Args:
      file: what the readers share.
      pair: A and B, which are two-dimensional.
    """
    site = file.site(pair, file.dense_module(pair))
    # transformers 5 holds the router as a bare parameter, so a config may name either.
    rank, parameter = pair.shape("A")[0], f"{pair.path}.weight"
    if file.config.targets_parameter(file.full_name(pair, parameter)):
        scale = file.scale(pair, rank, file.config.targets_parameter, parameter)
    else:
        scale = file.scale(pair, rank, file.config.targets_module, pair.path)
    a, b = file.load(pair, [(rank, site.in_width)], [(site.out_width, rank)])
    return uniform(a[None], b[None], scale, 1)


def read_joined(file: AdapterFile, pair: Pair, modules: Sequence[str]) -> list[LoRAWeights]:
    """A projection that is several here: A `[R, in]` for all of them, B `[out of all, R]` with the rows of each.

    Args:
      file: what the readers share.
      pair: A and B, which are two-dimensional.
      modules: the projections, in the order of their rows.
    """
    sites = [file.site(pair, module) for module in modules]
    rank, heights = pair.shape("A")[0], [site.out_width for site in sites]
    scale = file.scale(pair, rank, file.config.targets_module, pair.path)
    a, b = file.load(pair, [(rank, sites[0].in_width)], [(sum(heights), rank)])
    shared = a[None]  # one array, so that a bank stores it once
    return [uniform(shared, part[None], scale, 1) for part in np.split(b, np.cumsum(heights)[:-1])]


def read_per_expert(file: AdapterFile, pairs: Sequence[Pair]) -> Weights:
    """`experts.E.gate_proj` and so on, as under transformers 4: A `[R, in]`, B `[out, R]` for each expert.

    Args:
      file: what the readers share.
      pairs: A and B of the experts.
    """
    groups: dict[tuple[int, str], dict[int, Pair]] = {}
    for pair in pairs:
        index, part = pair.path.rsplit(".", 2)[1:]
        with file.problems:
            if part not in file.names.experts:
                expected = f"one of {', '.join(file.names.experts)}"
                raise file.error(pair, "the model has no such projection", part, expected)
            if file.two_dimensional(pair):
                groups.setdefault((pair.layer, file.names.experts[part]), {})[int(index)] = pair
    weights: Weights = {}
    for (layer, module), group in groups.items():
        with file.problems:
            weights[layer, module] = _stack(file, module, group)
    return weights


def _stack(file: AdapterFile, module: str, by_expert: Mapping[int, Pair]) -> LoRAWeights:
    """Experts that the file leaves out have rank 0, a zero update; the others keep their numbers."""
    site = file.site(next(iter(by_expert.values())), module)
    count = site.num_experts
    ranks, scales = np.zeros(count, np.int32), np.zeros(count, np.float32)
    loaded = {}
    for expert, pair in by_expert.items():
        with file.problems:
            if expert >= count:
                problem = f"the model has experts 0 to {count - 1}"
                raise file.error(pair, problem, f"expert {expert}", f"0 to {count - 1}")
            rank = pair.shape("A")[0]
            scale = file.scale(pair, rank, file.config.targets_module, pair.path)
            loaded[expert] = file.load(pair, [(rank, site.in_width)], [(site.out_width, rank)])
            ranks[expert], scales[expert] = rank, scale
    largest = int(ranks.max())
    a = file.blank((count, largest, site.in_width), _common(expert_a.dtype for expert_a, _ in loaded.values()))
    # Rows of B side by side, as the bank takes them.
    b = file.blank((site.out_width, count, largest), _common(expert_b.dtype for _, expert_b in loaded.values()))
    for expert, (expert_a, expert_b) in loaded.items() if file.values else ():
        a[expert, : ranks[expert]] = expert_a
        b[:, expert, : ranks[expert]] = expert_b
    return LoRAWeights(a, b.transpose(1, 0, 2), ranks, scales)


def _common(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The dtype that holds every value: the one that all have, else float32, which holds both half precisions."""
    kinds = set(dtypes)
    return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)


@dataclass(frozen=True)
class _Wrapper:
    """A 3-D parameter's pair. A is `[E*R, in]`, expert-major; B is `[out, R*E]`, rank-major and expert-minor.

    Unsloth before 2026-09-17 trained B as `[out, E*R]`, expert-major: the same columns in another order.

    Attributes:
      pair: A and B.
      parameter: `gate_up_proj` or `down_proj`.
      widths: (in, out) as peft writes today; up to 0.19.0 it wrote them exchanged.
      experts: E.
    """

    pair: Pair
    parameter: str
    widths: tuple[int, int]
    experts: int

    @property
    def file_widths(self) -> tuple[int, int]:
        return self.pair.shape("A")[1], self.pair.shape("B")[0]

    def read(self, file: AdapterFile, transposed: bool) -> tuple[np.ndarray, np.ndarray, float]:
        """The matrices of all experts, as views of the file's arrays.

        Args:
          file: what the readers share.
          transposed: A and B are exchanged, as peft up to 0.19.0 wrote them.

        Returns:
          A `[E, R, in]`, B `[E, out, R]`, and the scale.
        """
        rows, columns = self.pair.shape("A")[0], self.pair.shape("B")[1]
        if rows % self.experts or columns != rows:
            problem = f"A has {rows} rows and B {columns} columns, not one multiple of {self.experts} experts"
            raise file.error(self.pair, problem, f"{rows} and {columns}", f"a multiple of {self.experts}")
        name = f"{self.pair.path.removesuffix(_INNER)}.{self.parameter}"
        rank = rows // self.experts
        scale = file.scale(self.pair, rank, file.config.targets_parameter, name)
        a_width, b_width = reversed(self.widths) if transposed else self.widths
        a, b = file.load(self.pair, [(rows, a_width)], [(b_width, rows)])
        a = a.reshape(self.experts, rank, a_width)
        if self._b_layout(file) == GROUPED_BY_EXPERT:
            b = b.reshape(b_width, self.experts, rank).swapaxes(1, 2)
        else:
            b = b.reshape(b_width, rank, self.experts)
        return (b.transpose(2, 1, 0), a.transpose(0, 2, 1), scale) if transposed else (a, b.transpose(2, 0, 1), scale)

    def _b_layout(self, file: AdapterFile) -> str | None:
        """The order of B's columns: as the user says, else the config."""
        with file.problems:
            return file.b_layout or file.config.b_layout_of(self.parameter)
        return None


def read_wrappers(file: AdapterFile, pairs: Sequence[Pair]) -> Weights:
    """`experts.base_layer` and `experts`: peft's wrappers of the 3-D parameters, nested in the parameters' order.

    Args:
      file: what the readers share.
      pairs: A and B of the wrappers.
    """
    per_layer = Counter(pair.layer for pair in pairs)
    wrappers = []
    for pair in pairs:
        with file.problems:
            if file.two_dimensional(pair):
                wrappers.append(_wrapper(file, pair, nested=per_layer[pair.layer] == 2))
    transposed = _are_transposed(file, wrappers)
    if transposed:
        file.layout += " of peft up to 0.19.0"
    weights: Weights = {}
    for wrapper in wrappers:
        with file.problems:
            a, b, scale = wrapper.read(file, transposed)
            if wrapper.parameter == "down_proj":
                weights[wrapper.pair.layer, "down"] = uniform(a, b, scale, wrapper.experts)
            else:  # the halves hold one A, so that the bank stores it once
                for module, half in zip(("gate", "up"), file.names.gate_and_up(b), strict=True):
                    weights[wrapper.pair.layer, module] = uniform(a, half, scale, wrapper.experts)
    return weights


def _wrapper(file: AdapterFile, pair: Pair, nested: bool) -> _Wrapper:
    """Of two wrappers the inner one is `gate_up_proj`; of one alone, the config says which it is."""
    if nested:
        fused = pair.path.endswith(_INNER)
    elif pair.path.endswith(_INNER):
        raise file.error(pair, "an inner wrapper stands without its outer one", pair.path, "its outer one too")
    else:
        name = file.full_name(pair, pair.path)
        fused, down = (file.config.targets_parameter(f"{name}.{part}") for part in ("gate_up_proj", "down_proj"))
        if fused == down:
            both = "both gate_up_proj and down_proj" if fused else "neither gate_up_proj nor down_proj"
            problem = f"it stands alone, and target_parameters name {both} of this layer"
            raise file.error(pair, problem, both, "one of the two")
    site = file.site(pair, *(("gate", "up") if fused else ("down",)))
    widths = (site.in_width, 2 * site.out_width if fused else site.out_width)
    return _Wrapper(pair, "gate_up_proj" if fused else "down_proj", widths, site.num_experts)


def _are_transposed(file: AdapterFile, wrappers: Sequence[_Wrapper]) -> bool:
    """Whether peft up to 0.19.0 wrote the file. One version wrote all of it, so any shape that tells decides."""
    if file.names.stored_in_out:
        return False
    evidence: dict[bool, _Wrapper] = {}
    for wrapper in wrappers:
        if wrapper.widths[0] != wrapper.widths[1] and wrapper.file_widths in (wrapper.widths, wrapper.widths[::-1]):
            evidence[wrapper.file_widths != wrapper.widths] = wrapper
    if len(evidence) == 2:
        problem = f"it has the transposed orientation of peft up to 0.19.0, and {evidence[False].pair.key} today's"
        raise file.error(evidence[True].pair, problem, "both orientations", "one")
    square = next((wrapper for wrapper in wrappers if wrapper.widths[0] == wrapper.widths[1]), None)
    version = file.config.peft_version
    if square is None:
        return True in evidence
    if version is not None:
        evidence.setdefault(version <= LAST_TRANSPOSED, square)
    if len(evidence) != 1:
        why = "other shapes and peft_version disagree" if evidence else "no released peft_version is given"
        raise file.error(
            square.pair,
            f"its orientation is not known: as peft writes today A is the side of the input, as up to 0.19.0 B is; "
            f"both are {square.widths[0]} wide, and {why} in {file.config.file.name}",
            "two square sides",
            "a released peft_version, or other shapes that tell",
        )
    return True in evidence


PER_EXPERT = FileLayout("PEFT, per-expert matrices", _EXPERT, read_per_expert)
WRAPPERS = FileLayout("PEFT, 3-D parameters", re.compile(rf"({re.escape(_INNER)})?"), read_wrappers)
