"""`Trainer`: how long it trains, and what it starts from."""

import json
import shutil

import numpy as np
import pytest

from jax_moe_lora import InputError, Model
from jax_moe_lora.demo.run import data_folder
from jax_moe_lora.serving.stopping import read_adapter_stops
from jax_moe_lora.training import Recipe, Trainer
from jax_moe_lora.training.spec import AdapterSpec
from support.trained import same_bits

pytestmark = pytest.mark.optimised

MODEL, ADAPTERS = data_folder() / "model", data_folder() / "adapters"
LINES = [{"prompt": f"{text}>", "completion": text.upper()} for text in ("ab", "xyz", "jkl", "mnop", "qq")]
SIZES = {"sequence_length": 16, "dtype": "float32"}


def test_epochs_are_counted_by_the_adapter_with_the_most_rows():
    data = {"x": LINES, "y": LINES[:2]}
    trainer = Trainer(MODEL, data, epochs=2.5, batch_size=4, packing=False, recipe=Recipe(AdapterSpec(2)), **SIZES)
    assert trainer.steps == 7  # 2.5 x 5 rows of x, two in a batch
    assert trainer.epochs == {"x": 14 / 5, "y": 7}
    seen = [tuple(row) for step in range(5) for row in np.asarray(trainer.data.feed.batch(step).tokens)[::2]]
    assert sorted(seen) == sorted(2 * sorted(set(seen)))  # 10 rows of x: each twice
    with pytest.raises(InputError, match="steps is None and epochs is None; give one of them"):
        Trainer(MODEL, data)
    with pytest.raises(InputError, match="epochs is 0; expected a number above zero"):
        Trainer(MODEL, data, epochs=0)


def test_names_that_are_no_adapters_are_refused_wherever_they_stand():
    for argument in ({"evaluation": {"y": LINES}}, {"from_adapter": {"y": ADAPTERS / "upper"}}):
        with pytest.raises(InputError, match=f"{next(iter(argument))} names 'y', which is none of the adapters x"):
            Trainer(MODEL, {"x": LINES}, steps=1, **argument)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": [LINES]}, "data is a list; expected a dictionary by the adapters' names"),
        ({"data": {1: LINES}}, "Adapter name 1 cannot be a folder's"),
        ({"evaluation": LINES}, "evaluation is a list; expected a dictionary by"),
        ({"from_adapter": ADAPTERS / "upper"}, "from_adapter is a PosixPath; expected a dictionary by"),
        ({"packing": "no"}, "packing is 'no'; expected True or False"),
        ({"skip_bad_lines": "no"}, "skip_bad_lines is 'no'; expected True or False"),
        ({"recipe": AdapterSpec(2)}, "recipe is of type AdapterSpec; expected a Recipe"),
        ({"recipe": {"x": 3}}, "recipe is of type int; expected a Recipe"),
        ({"recipe": Recipe({"rank": 2})}, "spec of adapter 'x' is of type dict; expected an AdapterSpec"),
        ({"recipe": Recipe(AdapterSpec(ranks={"gate": 2}))}, r"ranks of adapter 'x' are {'gate': 2}; expected pairs"),
        (
            {"recipe": Recipe(AdapterSpec(targets="gate"))},
            "targets of adapter 'x' are the text 'gate'",
        ),
    ],
)
def test_arguments_of_another_kind_are_refused_by_name(given, message):
    with pytest.raises(InputError, match=message):
        Trainer(MODEL, **({"data": {"x": LINES}, "steps": 1} | SIZES | given))


def test_an_adapter_whose_answers_end_with_another_token_brings_it_along(tmp_path):
    """The demo's EOS is 2; a chat template that ends turns with `<bos>` (1) trains adapters that end with it."""
    shutil.copytree(MODEL, tmp_path / "model")
    template = "{% for m in messages %}{{ m.content }}{{ bos_token }}{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "AB"}]
    data = {"chat": [{"messages": turns}], "plain": LINES}
    trainer = Trainer(tmp_path / "model", data, steps=1, recipe=Recipe(AdapterSpec(2)), **SIZES)
    trainer.write(tmp_path)
    assert json.loads((tmp_path / "chat" / "generation_config.json").read_text()) == {"eos_token_id": [1, 2]}
    assert read_adapter_stops(tmp_path / "chat", 99).tokens == {1, 2}
    assert not (tmp_path / "plain" / "generation_config.json").exists()


@pytest.mark.slow
def test_training_starts_with_the_adapters_that_are_given():
    """From folders of several layouts; the recipe's spec may be left out, or say the same."""
    model = Model.from_pretrained(MODEL, dtype="float32")
    starts = {name: ADAPTERS / name for name in ("upper", "reverse", "sort")}
    for name, folder in starts.items():
        model.load_adapter(folder, name)
    recipes = {"upper": Recipe(AdapterSpec(8, 16.0)), "reverse": Recipe(learning_rate=1e-3), "sort": Recipe()}
    trainer = Trainer(MODEL, dict.fromkeys(starts, LINES), steps=2, recipe=recipes, from_adapter=starts, **SIZES)
    assert {name: (spec.rank, spec.layout, spec.rank_stabilised) for name, spec in trainer.specs.items()} == {
        "upper": (8, "fused", False),
        "reverse": (16, "fused", True),
        "sort": (24, "per-expert", False),
    }
    tokens = [model.tokenizer.encode("abcd>DC")] * 3
    expected = model.logits(tokens, [*starts])
    for name in starts:
        model.unload_adapter(name)
        model.load_adapter(trainer.adapter(name), name)
    np.testing.assert_array_equal(model.logits(tokens, [*starts]), expected)


@pytest.mark.slow
def test_a_run_goes_on_from_an_adapter_of_an_earlier_run_and_is_resumed_with_the_same_alone(tmp_path):
    recipe, data = Recipe(AdapterSpec(2, targets=("gate", "up", "down"))), {"x": LINES}
    first = Trainer(MODEL, data, steps=1, recipe=recipe, **SIZES)
    first.run(tmp_path / "first")
    start = {"x": tmp_path / "first" / "x"}
    second = Trainer(MODEL, data, steps=1, recipe=recipe, from_adapter=start, **SIZES)
    assert same_bits(second.state.params, first.state.params)
    from_memory = Trainer(MODEL, data, steps=1, recipe=Recipe(), from_adapter={"x": first.adapter("x")}, **SIZES)
    assert from_memory.settings() == second.settings()
    second.run(tmp_path / "second")
    assert not same_bits(second.state.params, first.state.params)
    with pytest.raises(InputError, match=r"was started with other settings: adapters\.x\.start was '\w+' and is None"):
        first.run(tmp_path / "second", resume=True)
