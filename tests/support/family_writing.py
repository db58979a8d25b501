"""A family's adapters written and merged: what comes out is what PEFT and transformers make of it.

class TestGptOss(FamilyTests, WritingTests): ...
"""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora import BASE_SLOT, write_adapter
from jax_moe_lora.adapters.formats.detect import read_adapter
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.loading import load_params
from jax_moe_lora.models.names import adapter_names
from jax_moe_lora.models.sites import adapter_sites
from jax_moe_lora.tools.merge import merge_adapter
from support.family_tests import LENGTH, LIMIT
from support.layers import assert_close
from support.networks import peft_logits


class WritingTests:
    """Each test has the fixture `served`, whose last adapter is written and merged."""

    @pytest.mark.parametrize("layout", ["peft", "tinker", "tensorrt-llm"])
    def test_what_is_written_is_read_as_the_same_updates(self, served, layout, tmp_path):
        sites, names = adapter_sites(served.model.config), adapter_names(served.model.config)
        adapter = read_adapter(list(served.paths.values())[-1], sites, names)
        write_adapter(adapter, tmp_path / "written", sites, names, layout, expand=True, fold_scale=True)
        again = read_adapter(tmp_path / "written", sites, names)
        assert {*again.weights} == {*adapter.weights}
        for key, weights in adapter.weights.items():
            for expert in (0, len(weights.ranks) - 1):
                assert_close(again.weights[key].delta(expert), weights.delta(expert), LIMIT)
        if layout == "peft":
            row = len(served.paths) - 1
            logits = peft_logits(served.base, tmp_path / "written", served.tokens[row, None])
            assert_close(logits[0], served.expected[row], LIMIT)

    def test_the_merged_model_is_the_model_with_its_adapter(self, served, tmp_path):
        sites, names = adapter_sites(served.model.config), adapter_names(served.model.config)
        adapter = read_adapter(list(served.paths.values())[-1], sites, names)
        merge_adapter(adapter, served.base, tmp_path / "merged")
        config = read_model_config(tmp_path / "merged")
        assert config == served.model.config
        params, rows = load_params(tmp_path / "merged", config, "float32"), len(served.paths)
        # The last row's tokens in all rows: the program of the base model is there already.
        tokens, nobody = np.tile(served.tokens[-1], (rows, 1)), jnp.full(rows, BASE_SLOT, jnp.int32)
        for cut in range(0, LENGTH, 5):
            lengths = LENGTH - cut - np.arange(rows)
            run = partial(served.functions["prefill"], params, None, served.cache())
            logits = run(jnp.asarray(tokens), jnp.asarray(lengths), nobody)[1]
            assert_close(logits, served.expected[-1, lengths - 1], LIMIT)
        theirs = peft_logits(tmp_path / "merged", None, tokens[:1])
        assert_close(theirs[0], served.expected[-1], LIMIT)
