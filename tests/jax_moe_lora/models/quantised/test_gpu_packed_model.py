"""Quantised models on an H100 or H200, whose experts are packed when loaded: `pytest -m gpu -k packed_model`."""

import numpy as np
import pytest

from jax_moe_lora import Model
from jax_moe_lora.models.sites import layer_sites
from support import quantised_files as files
from support.checkpoints import TINY, expected_shapes
from support.gpu import require
from support.meshes import LAYOUTS, random_adapter

pytestmark = pytest.mark.gpu("hopper")

SIZES = TINY | {
    "num_hidden_layers": 1,
    "mlp_only_layers": [],
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "head_dim": 64,
    "num_experts": 8,
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
TOKENS = np.random.default_rng(1).integers(0, 32, (6, 5)).astype(np.int32)
NAMES = [None, *LAYOUTS, None]


@pytest.fixture(scope="module", params=["fp8 as published", "mxfp4", "int4"])
def models(request, tmp_path_factory) -> tuple[Model, Model]:
    """By the kernels, and the same checkpoint through XLA."""
    require("hopper")
    folder, rng = tmp_path_factory.mktemp("model"), np.random.default_rng()
    shapes = expected_shapes(SIZES)
    tensors = {name: 0.2 * rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    few, plain = files.write(folder, SIZES, tensors, FP8, lambda matrix: files.fp8_block(matrix, (128, 128)))
    published = "published" in request.param
    folder, quantise = (few, None) if published else (plain, request.param)

    def load(implementation):
        options = {"implementation": implementation, "quantise": quantise}
        model = Model.from_pretrained(folder, max_adapters=4, max_rank=32, adapter_memory="64MiB", **options)
        for seed, layout in enumerate(LAYOUTS):
            model.load_adapter(random_adapter(layout, layer_sites(model.config), seed), layout)
        return model

    return load(None), load("xla")


def test_logits_and_answers_are_those_of_the_model_in_rows(models):
    by_kernels, by_xla = models
    assert by_kernels.params.layers[-1]["gate"].format.layout == "hopper"
    assert by_xla.params.layers[-1]["gate"].format.layout == "rows"
    found, expected = (np.asarray(model.logits(TOKENS, NAMES)) for model in models)
    assert np.linalg.norm(found - expected) <= 3e-2 * np.linalg.norm(expected)
    alone = np.asarray(by_kernels.logits(TOKENS, [None] * len(NAMES)))
    for row, name in enumerate(NAMES):
        assert (found[row] == alone[row]).all() == (name is None), name
    answers = by_kernels.generate(TOKENS.tolist(), adapter_names=NAMES, max_new_tokens=4)
    assert all(answer for answer in answers)
