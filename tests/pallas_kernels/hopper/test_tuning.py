"""Which config a call gets: explicit, tuned, or heuristic, and always one that the kernels can run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.errors import TunedFileError
from pallas_kernels.grouped_matmul import hopper
from pallas_kernels.hopper import limits, tuned_file
from pallas_kernels.hopper.tuned_file import config_for, tile_rows
from pallas_kernels.hopper.tuning import MAX_ROWS, HopperConfig, MatmulShape, bucket, heuristic, smem_bytes, why_not
from pallas_kernels.ops import make_plan
from pallas_kernels.pages import NO_ADAPTERS
from pallas_kernels.specs import LAYERS, TOKENS

TILES = {"experts": 8, "pairs": 64, "tile_rows": 24}
MATMUL = {"experts": 8, "pairs": 64, "in_width": 128, "out_width": 64, "gated": True, "dtype": "bfloat16"}
CONFIG = {"tile_rows": 24, "stages": 3, "warpgroups": 2}
FILE = {"device": "cpu", "tiles": [TILES], "matmuls": [MATMUL | CONFIG]}


@pytest.fixture
def use(tmp_path, monkeypatch):
    """`use(content)`: makes it the tuned file."""

    def write(content) -> None:
        path = tmp_path / "tuned.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv(tuned_file.VARIABLE, str(path))

    return write


def test_a_tuned_entry_comes_before_the_heuristic(use):
    call = MatmulShape(**MATMUL)
    assert (tuned_file.source(), tile_rows(64, 8)) == ("heuristic", heuristic(64, 8).tile_rows)
    use(FILE)
    assert (tuned_file.source(), tile_rows(64, 8)) == ("tuned.json", 24)
    assert config_for(call, 24) == HopperConfig(24, 3)
    assert config_for(MatmulShape(**MATMUL | {"dtype": "float16"}), 24) == heuristic(64, 8, 24)


def test_an_entry_holds_for_its_bucket_of_pairs(use):
    use(FILE)
    assert [tile_rows(pairs, 8) == 24 for pairs in (32, 33, 64, 65)] == [False, True, True, False]
    assert [bucket(pairs) for pairs in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]


def test_the_plan_decides_the_tiles_and_the_matmul_follows(use):
    """An explicit tile size wins, and a tuned entry for other tiles does not cut the plan's again."""
    use(FILE)
    arguments = jnp.zeros((32, 2), jnp.int32), jnp.zeros(32, jnp.int32), 8, 0, "hopper"
    sizes = []
    for rows in (None, 40):
        jax.eval_shape(lambda r=rows: sizes.append(make_plan(*arguments, rows_per_tile=r).tiles.size))
    assert sizes == [24, 40]
    assert config_for(MatmulShape(**MATMUL), 40) == heuristic(64, 8, 40)
    with pytest.raises(ValueError, match="tile_rows is 20; expected a multiple of 8"):
        config_for(MatmulShape(**MATMUL), 20)


def test_a_config_that_no_kernel_can_run_is_refused():
    x, weight = jnp.zeros((4, 64), jnp.bfloat16), jnp.zeros((8, 64, 64), jnp.bfloat16)

    def call(config):
        plan = make_plan(jnp.zeros((4, 2), jnp.int32), jnp.zeros(4, jnp.int32), 8, 0, "hopper")
        options = {"of_tokens": True, "biases": (None,), "steps": None, "activation": "silu", "config": config}
        return hopper.grouped_matmul(x, (weight,), plan, adapters=NO_ADAPTERS.select("gate"), **options)

    jax.eval_shape(lambda: call(HopperConfig(16, 2)))
    with pytest.raises(ValueError, match=r"cannot be cut like this: tile_rows is 20; expected a multiple of 8"):
        jax.eval_shape(lambda: call(HopperConfig(20, 2)))


def test_off_and_a_rewritten_file(use, monkeypatch):
    use(FILE)
    assert tile_rows(64, 8) == 24
    use(FILE | {"tiles": [TILES | {"tile_rows": 16}]})
    assert tile_rows(64, 8) == 16
    monkeypatch.setenv(tuned_file.VARIABLE, "off")
    assert (tuned_file.source(), tile_rows(64, 8)) == ("heuristic", heuristic(64, 8).tile_rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as a tuned file"),
        ([], "is no tuned file: expected an object with device, tiles and matmuls"),
        (FILE | {"device": "NVIDIA H100"}, "was tuned on 'NVIDIA H100', this is 'cpu'"),
        (FILE | {"tiles": [TILES | {"rows": 3}]}, "has other fields than experts, pairs, tile_rows"),
        (FILE | {"tiles": [TILES | {"tile_rows": 12}]}, "tile_rows is 12; expected a multiple of 8"),
        (FILE | {"tiles": [TILES | {"pairs": 65}]}, "pairs is no power of two"),
        (FILE | {"tiles": [TILES, TILES]}, "comes twice"),
        (FILE | {"matmuls": [MATMUL | CONFIG | {"stages": 99}]}, "bytes of shared memory; a block has"),
        (FILE | {"matmuls": [MATMUL | CONFIG | {"tile_rows": 200}]}, "expected a multiple of 8 up to 192"),
        (FILE | {"matmuls": [MATMUL | CONFIG | {"in_width": "128"}]}, "in_width is no positive integer"),
    ],
)
def test_a_broken_file_is_refused_by_name(use, content, message):
    use(content)
    with pytest.raises(TunedFileError, match=message) as raised:
        tile_rows(64, 8)
    assert "tuned.json" in str(raised.value)


def test_a_file_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv(tuned_file.VARIABLE, "nowhere.json")
    with pytest.raises(TunedFileError, match=r"There is no file nowhere.json, which JAX_MOE_LORA_TUNED names"):
        tile_rows(64, 8)


@pytest.mark.parametrize("shape", LAYERS)
def test_the_heuristic_is_valid_whatever_the_tiles(shape):
    spec = LAYERS[shape]
    for tokens in (*TOKENS, 3, 777, 10**6):
        pairs = tokens * spec.top_k
        for rows in (None, 8, 24, 128):
            assert why_not(heuristic(pairs, spec.num_experts, rows)) == ""


@pytest.mark.parametrize("mean", np.arange(112, 2100, 9.5))
def test_long_tiles_multiply_few_rows_that_they_do_not_have(mean):
    """Under uniform routing; and are few enough to have little code."""
    experts = 64
    config = heuristic(int(mean * experts), experts)
    rows = np.random.default_rng(0).multinomial(int(mean * experts), np.full(experts, 1 / experts), size=40)
    widths = np.array([0, *config.widths, config.tile_rows])
    whole, rest = np.divmod(rows, config.tile_rows)
    multiplied = whole * config.tile_rows + widths[np.searchsorted(widths, rest)]
    assert multiplied.sum() < 1.2 * rows.sum()
    assert len(config.widths) <= 4


def test_every_committed_file_is_valid_and_named_after_its_device():
    for path in tuned_file.FOLDER.glob("*.json"):
        content = tuned_file.read(path)
        assert path.stem == tuned_file.slug(content["device"])
        assert {"date", "versions", "command", "method"} <= content.keys()


def test_a_device_is_found_by_its_kind():
    assert tuned_file.slug("NVIDIA H200") == "nvidia-h200"
    assert tuned_file.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert jax.devices()[0].device_kind == "cpu"


def test_every_heuristic_config_fits():
    for pairs in (1, 7, 64, 1000, 4096, 65536, 10**6):
        for experts in (1, 8, 64, 128, 256):
            config = heuristic(pairs, experts)
            assert config.tile_rows % 8 == 0
            assert 8 <= config.tile_rows <= MAX_ROWS
            assert all(0 < width < config.tile_rows and width % 8 == 0 for width in config.widths)
            assert config.stages >= 2
            assert smem_bytes(config) + limits.BARRIER_BYTES <= limits.SMEM_BYTES
