"""`router_trace` sees what transformers' routers compute, and what `generate` runs."""

import numpy as np
import pytest

from jax_moe_lora import AdapterNameError, InputError, Model
from jax_moe_lora.demo.run import data_folder
from jax_moe_lora.inspect import router_trace, spectra

pytestmark = pytest.mark.optimised

LENGTHS = [9, 4, 7]


@pytest.fixture(scope="module")
def model() -> Model:
    model = Model.from_pretrained(data_folder() / "model", dtype="float32", max_adapters=2)
    for name in ("reverse", "upper"):
        model.load_adapter(data_folder() / "adapters" / name, name)
    return model


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 99, (3, 9))


@pytest.mark.parity
@pytest.mark.xdist_group("parity")
def test_scores_and_choices_are_those_of_transformers_and_peft(model, tokens):
    torch = pytest.importorskip("torch")
    from support.networks import load_peft

    names = [None, "reverse", "upper"]
    trace = router_trace(model, tokens, names, LENGTHS)
    assert trace.layers == (0, 1, 2)
    assert trace.real.sum(1).tolist() == LENGTHS
    for row, (name, length) in enumerate(zip(names, LENGTHS, strict=True)):
        network = load_peft(data_folder() / "model", name and data_folder() / "adapters" / name)
        seen = []
        for module_name, module in network.named_modules():
            if module_name.endswith("mlp.gate"):
                module.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        with torch.no_grad():
            network(torch.tensor(tokens[row : row + 1, :length]))
        assert len(seen) == 3
        for layer, (scores, weights, experts) in enumerate(seen):
            found = trace.scores[layer, row, :length]
            assert np.linalg.norm(found - scores.numpy()) <= 1e-5 * np.linalg.norm(scores.numpy()), (name, layer)
            np.testing.assert_array_equal(trace.experts[layer, row, :length], experts.numpy())
            np.testing.assert_allclose(trace.weights[layer, row, :length], weights.numpy(), rtol=1e-4)
    np.testing.assert_allclose(trace.probabilities.sum(-1), 1, rtol=1e-5)


@pytest.mark.slow
def test_a_rows_routing_is_its_own_whatever_the_others_use(model, tokens):
    mixed = router_trace(model, tokens, ["upper", "reverse", None], LENGTHS)
    base = router_trace(model, tokens, None, LENGTHS)
    np.testing.assert_array_equal(mixed.scores[:, 2][:, : LENGTHS[2]], base.scores[:, 2][:, : LENGTHS[2]])
    np.testing.assert_array_equal(mixed.scores[0, 0, :9], base.scores[0, 0, :9])  # upper is on the experts alone
    assert (mixed.scores[1, 0, :9] != base.scores[1, 0, :9]).any()


def test_bad_arguments_are_refused_in_a_sentence(model, tokens):
    with pytest.raises(InputError, match="adapter_names has 2 entries for 3 rows"):
        router_trace(model, tokens, ["upper", None])
    with pytest.raises(AdapterNameError, match="nobody"):
        router_trace(model, tokens, ["nobody", None, None])
    with pytest.raises(InputError, match="token_ids"):
        router_trace(model, tokens + 99)


def test_texts_names_and_folders_are_taken_as_generate_takes_them(model):
    texts, folder = ["hello>", "abc>", "wxyz>"], data_folder() / "adapters" / "upper"
    encoded = [model.tokenizer.encode(text) for text in texts]
    padded = np.zeros((3, max(map(len, encoded))), int)
    for row, ids in enumerate(encoded):
        padded[row, : len(ids)] = ids
    model.unload_adapter("upper")
    try:
        by_text = router_trace(model, texts, ["reverse", None, folder])
        assert set(model.adapter_status) == {"reverse"}  # the folder was loaded for the call alone
    finally:
        model.load_adapter(folder, "upper")
    by_array = router_trace(model, padded, ["reverse", None, "upper"], [len(ids) for ids in encoded])
    by_lists = router_trace(model, encoded, ["reverse", None, "upper"])
    for trace in (by_text, by_lists):
        np.testing.assert_array_equal(trace.token_ids, padded)
        np.testing.assert_array_equal(trace.real, by_array.real)
        np.testing.assert_array_equal(trace.scores[:, by_array.real], by_array.scores[:, by_array.real])
    with pytest.raises(AdapterNameError, match="nobody"):
        router_trace(model, texts, ["nobody", None, None])


def test_spectra_take_a_name_or_a_folder_beside_an_adapter_in_memory(model):
    folder = data_folder() / "adapters" / "reverse"
    layers, values = spectra(model.adapter("reverse"), "down")
    for adapter, of in (("reverse", model), (folder, model), (str(folder), data_folder() / "model")):
        found = spectra(adapter, "down", of)
        assert found[0] == layers
        np.testing.assert_array_equal(found[1], values)
    with pytest.raises(InputError, match="'reverse'; give model= too"):
        spectra("reverse", "down")
