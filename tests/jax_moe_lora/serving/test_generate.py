"""Generation: sampling, stopping, streaming, buckets, and no recompilation."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

from jax_moe_lora import (
    AdapterInUseError,
    AdapterNameError,
    BankFullError,
    CheckpointError,
    InputError,
    JaxMoELoRAError,
    Model,
    SamplingParams,
    count_compilations,
)
from jax_moe_lora.demo.run import data_folder, load_demo
from jax_moe_lora.serving import adapters as reading
from jax_moe_lora.serving import model as surface
from jax_moe_lora.serving import programs
from jax_moe_lora.serving.requests import PaddedBatch, Request

pytestmark = [pytest.mark.xdist_group("demo"), pytest.mark.optimised]
NAMES = [None, "upper", "reverse", "sort"]
PROMPTS = ["abc>", "hello>", "world>", "zyx>"]
ANSWERS = ["abc", "HELLO", "dlrow", "xyz"]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_demo()


def texts(outs) -> list[str]:
    return [out.text for out in outs]


def test_each_request_is_answered_by_its_own_adapter(model):
    outs = model.generate(PROMPTS, NAMES, max_new_tokens=10)
    assert texts(outs) == ANSWERS
    assert [out.adapter_name for out in outs] == NAMES
    assert {out.finish_reason for out in outs} == {"stop"}
    assert texts(model.generate(PROMPTS, ["__base__"] * 4, max_new_tokens=10)) == [p[:-1] for p in PROMPTS]


def test_prompts_may_be_token_ids(model):
    ids = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    assert texts(model.generate(ids, NAMES, max_new_tokens=10)) == ANSWERS


def test_prompts_are_read_whole_unpadded_and_with_one_bos(model, tmp_path, monkeypatch):
    """Whatever the file says of who saved it, and also where the text begins with BOS, as a chat template's does."""
    saved = Tokenizer.from_file(str(data_folder() / "model" / "tokenizer.json"))
    saved.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    saved.enable_truncation(2)
    saved.enable_padding(length=12)
    saved.save(str(tmp_path / "tokenizer.json"))
    served, read = Model(model.config, model.params, model.functional(1, 16).bank, tmp_path), []
    monkeypatch.setattr(
        programs,
        "start",
        lambda params, bank, cache, tokens, lengths, *_, **__: read.append(
            [row[:length].tolist() for row, length in zip(np.asarray(tokens), np.asarray(lengths), strict=True)]
        ),
    )
    with pytest.raises(TypeError):  # the program that stands for the model gives nothing
        served.generate(["abc>", "<bos>abc>"], max_new_tokens=4)
    assert read == [[[1, *model.tokenizer.encode("abc>")]] * 2]


@pytest.mark.newest
@pytest.mark.slow
@pytest.mark.parametrize("content", [None, "{}"], ids=["missing", "broken"])
def test_token_ids_need_no_tokenizer(model, tmp_path, content):
    shutil.copytree(data_folder() / "model", tmp_path / "model")
    for file in (tmp_path / "model").glob("*token*"):
        file.unlink()
    if content is not None:
        (tmp_path / "model" / "tokenizer.json").write_text(content)
    bare = Model.from_pretrained(tmp_path / "model", dtype="float32", max_adapters=8, max_rank=64)
    out, *others = bare.generate([model.tokenizer.encode(prompt) for prompt in PROMPTS], max_new_tokens=10)
    assert model.tokenizer.decode(out.token_ids) == "abc"
    assert {one.text for one in (out, *others)} == {""}


@pytest.mark.slow
def test_prompts_and_names_may_be_arrays(model):
    ids = np.asarray([model.tokenizer.encode(prompt) for prompt in ("abc>", "xyz>")])
    outs = model.generate(ids, np.array(["upper", "reverse"]), max_new_tokens=np.int64(10), temperature=np.float32(0))
    assert texts(outs) == ["ABC", "zyx"]


@pytest.mark.parametrize("limits", [[1, 2, 3, 10], np.array([1, 2, 3, 10]), jnp.array([1, 2, 3, 10])], ids=type)
def test_each_request_has_its_own_limit(model, limits):
    outs = model.generate(PROMPTS, NAMES, max_new_tokens=limits)
    assert texts(outs) == ["a", "HE", "dlr", "xyz"]
    assert [out.finish_reason for out in outs] == ["length", "length", "length", "stop"]


def test_streaming_gives_the_answer_piece_by_piece(model):
    pieces = ["", "", "", ""]

    def collect(index: int, token: int, text: str) -> None:
        assert isinstance(token, int)
        pieces[index] += text

    model.generate(PROMPTS, NAMES, max_new_tokens=10, callback=collect)
    assert pieces == ANSWERS


@pytest.fixture
def byte_model(model, tmp_path, monkeypatch):
    """Makes a model whose answers are given, in tokens of one byte each; they end where a list does."""

    def make(*answers: list[int]) -> Model:
        eos = byte_level_bpe().get_vocab_size()
        byte_level_bpe().save(str(tmp_path / "tokenizer.json"))
        tokens = iter(zip_longest(*answers, fillvalue=eos))

        def step(params, bank, cache, *arguments, **static):
            return cache, programs.DrawnTokens(jnp.asarray(next(tokens, [eos] * len(answers)), jnp.int32))

        monkeypatch.setattr(programs, "start", step)
        monkeypatch.setattr(programs, "advance", step)
        config = replace(model.config, eos_token_ids=(eos,))
        return Model(config, model.params, model.functional(1, 16).bank, tmp_path)

    return make


def byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(BPE({letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return tokenizer


def test_streaming_keeps_characters_of_several_tokens_whole(byte_model):
    whole, broken = byte_level_bpe().encode("a€\N{CROISSANT}ö").ids, byte_level_bpe().encode("b€").ids[:-1]
    served = byte_model(whole, broken, broken)
    pieces: list[list[str]] = [[], [], []]
    limits = [20, 20, len(broken)]
    outs = served.generate(
        [[1]] * 3, max_new_tokens=limits, callback=lambda index, token, text: pieces[index].append(text)
    )
    assert texts(outs) == ["a€\N{CROISSANT}ö", "b\ufffd", "b\ufffd"]
    assert [out.finish_reason for out in outs] == ["stop", "stop", "length"]
    assert pieces[0] == ["a", "", "", "€", "", "", "", "\N{CROISSANT}", "", "ö"]
    assert pieces[1] == ["b", "", "", "\ufffd"]  # the last comes with the end-of-sequence token
    assert pieces[2] == ["b", "", "\ufffd"]


def test_generation_stops_at_every_end_token_of_a_list(byte_model):
    ends = byte_level_bpe().encode("!?").ids
    texts_and_ends = ["ab!cd", "ab?cd", "ab?!"]
    served = byte_model(*[byte_level_bpe().encode(text).ids for text in texts_and_ends])
    served.config = replace(served.config, eos_token_ids=tuple(ends))
    outs = served.generate([[1]] * 3, max_new_tokens=5)
    assert [(out.text, out.finish_reason) for out in outs] == [("ab", "stop")] * 3


def test_a_progress_bar_changes_no_answer(model):
    assert texts(model.generate(PROMPTS, NAMES, max_new_tokens=10, progress=True)) == ANSWERS


def test_nothing_compiles_after_the_first_batch_and_load(model):
    """Contract 5 over the whole process: loads, unloads, slot reuse, other mixes, sampling and ranks."""
    model.generate(PROMPTS, NAMES, max_new_tokens=10)
    with count_compilations() as count:
        model.unload_adapter("sort")  # rank and layout differ from what comes next into this slot
        model.load_adapter(data_folder() / "adapters" / "reverse", "again")
        outs = model.generate(PROMPTS, ["again", None, "upper", "again"], max_new_tokens=10, temperature=0.5, top_k=2)
        model.unload_adapter("again")
        model.load_adapter(data_folder() / "adapters" / "sort", "sort")
        assert texts(model.generate(PROMPTS, NAMES, max_new_tokens=10)) == ANSWERS
    assert outs[0].adapter_name == "again"
    assert count.compilations == 0


@pytest.mark.slow
def test_functional_form_gives_the_same_tokens_under_a_users_own_jit(model):
    fn = model.functional(batch=4, max_length=32)
    encoded = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    tokens = np.zeros((4, 8), np.int32)
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids)] = ids
    lengths, slots = jnp.asarray([len(ids) for ids in encoded]), model.slots(NAMES)
    prefill = jax.jit(fn.prefill, donate_argnums=2)
    decode = jax.jit(fn.decode, donate_argnums=2)
    cache, logits = prefill(fn.params, fn.bank, fn.init_cache(), jnp.asarray(tokens), lengths, slots)
    steps = []
    for _ in range(4):
        steps.append(jnp.argmax(logits, -1).astype(jnp.int32))
        cache, logits = decode(fn.params, fn.bank, cache, steps[-1], slots)
    assert model.tokenizer.decode([int(step[1]) for step in steps]) == "HELL"
    full = model.logits(tokens, NAMES, [len(ids) for ids in encoded])
    assert int(jnp.argmax(full[1, len(encoded[1]) - 1])) == int(steps[0][1])


def test_names_slots_and_bytes_are_reported(model):
    infos = model.adapters
    assert set(infos) >= {"upper", "reverse", "sort"}
    assert len({info.slot for info in infos.values()}) == len(infos)
    assert all(info.nbytes > 0 and info.ranks for info in infos.values())


def test_unknown_taken_and_reserved_names_are_refused(model):
    with pytest.raises(AdapterNameError, match=r"'nope' is loaded or registered \(there are: .*upper"):
        model.generate(["a>"], ["nope"])
    with pytest.raises(AdapterNameError, match=r"named 'upper' \(ready\); unload it"):
        model.load_adapter(data_folder() / "adapters" / "upper", "upper")
    with pytest.raises(AdapterNameError, match="reserved"):
        model.load_adapter(data_folder() / "adapters" / "upper", "__base__")


@pytest.mark.newest
@pytest.mark.slow
def test_an_adapter_in_use_is_not_unloaded(model):
    def unload(*_) -> None:
        with pytest.raises(AdapterInUseError, match="'upper' is used by 1"):
            model.unload_adapter("upper")

    assert texts(model.generate(PROMPTS, NAMES, max_new_tokens=10, callback=unload)) == ANSWERS


@pytest.mark.slow
@pytest.mark.newest
def test_loading_during_generation_leaves_the_running_batch_alone(model):
    loaded = []

    def load(*_) -> None:
        if not loaded:
            loaded.append(model.load_adapter(data_folder() / "adapters" / "sort", "late"))

    assert texts(model.generate(PROMPTS, NAMES, max_new_tokens=10, callback=load)) == ANSWERS
    asked = model.generate(["cba>", *PROMPTS[1:]], ["late", *NAMES[1:]], max_new_tokens=10)
    assert texts(asked) == ["abc", *ANSWERS[1:]]
    model.unload_adapter("late")


@pytest.fixture
def during_a_load(model, monkeypatch):
    """Calls a function while an adapter named "late" loads: its files are read, its pages are not in the bank."""

    def load(check) -> None:
        real = reading.read_adapter

        def read(*arguments, **options):
            check()
            return real(*arguments, **options)

        monkeypatch.setattr(reading, "read_adapter", read)
        model.load_adapter(data_folder() / "adapters" / "sort", "late")
        monkeypatch.undo()

    yield load
    model.unload_adapter("late")


def test_a_request_for_an_adapter_that_is_loading_waits_for_it(model, during_a_load):
    with ThreadPoolExecutor(1) as pool:
        waiting = []

        def check() -> None:
            assert "late" not in model.adapters
            assert model.adapter_status["late"].state == "loading"
            with pytest.raises(AdapterNameError, match="'late' is loading, not in a slot"):
                model.slots(["late"])
            with pytest.raises(AdapterNameError, match=r"'late' \(loading\); unload it"):
                model.load_adapter(data_folder() / "adapters" / "sort", "late")
            with pytest.raises(AdapterInUseError, match="'late' is loading"):
                model.unload_adapter("late")
            waiting.append(pool.submit(model.generate, ["cba>", *PROMPTS[1:]], ["late", *NAMES[1:]], max_new_tokens=10))

        during_a_load(check)
        assert texts(waiting[0].result()) == ["abc", *ANSWERS[1:]]


@pytest.mark.parametrize("name", ["__base__", None])
def test_the_base_model_is_not_unloaded(model, name):
    with pytest.raises(AdapterNameError, match="is the base model, which is never unloaded"):
        model.unload_adapter(name)


def test_a_failed_load_leaves_everything_as_it_was(tmp_path):
    model = Model.from_pretrained(data_folder() / "model", dtype="float32", max_adapters=1)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "use_dora": true}')
    with pytest.raises(ValueError, match="use_dora"):
        model.load_adapter(tmp_path, "bad")
    assert model.adapters == {}
    model.load_adapter(data_folder() / "adapters" / "upper", "upper")
    with pytest.raises(BankFullError, match="1 in all, 1 needed at once, 1 held by adapters that were loaded or"):
        model.load_adapter(data_folder() / "adapters" / "sort", "sort")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "abc>"}, "expected a list"),
        ({"prompts": [""]}, "Prompt 0 is empty"),
        ({"prompts": ["a>"], "adapter_names": [None, None]}, "2 entries for 1 prompts"),
        ({"prompts": ["a>"], "max_new_tokens": 0}, "Prompt 0: max_new_tokens is 0; expected 1 to"),
        ({"prompts": ["a>"], "max_new_tokens": 10**6}, "positions"),
        ({"prompts": ["a>"], "temperature": -1.0}, "temperature"),
        ({"prompts": ["a>"], "top_p": 0.0}, "top_p"),
        ({"prompts": ["a>"], "top_k": -1}, "top_k"),
        ({"prompts": ["a>"], "seed": -1}, "seed"),
        ({"prompts": ["a>", "b>"], "seed": [1]}, "1 values for 2 prompts"),
        ({"prompts": [[10**6]]}, "token id outside"),
        ({"prompts": ["a>"], "pad_to": (1, 1)}, "pad_to"),
        ({"prompts": ["a>"], "pad_to": 8}, r"pad_to is 8; expected \(batch, prompt tokens\)"),
        ({"prompts": ["a>"], "pad_to": (1, None)}, "pad_to's prompt tokens is None; expected a whole number"),
        ({"prompts": None}, "prompts is of type NoneType; expected a list"),
        ({"prompts": b"a>"}, "prompts is of type bytes; expected a list"),
        ({"prompts": ["a>", None]}, "Prompt 1 is of type NoneType; expected a text, messages or a list of token ids"),
        ({"prompts": [b"a>"]}, "Prompt 0 is of type bytes; expected a text"),
        ({"prompts": [[1, 2.0]]}, "Prompt 0 holds 2.0; expected token ids"),
        ({"prompts": [np.array([1.0])]}, "Prompt 0 holds 1.0; expected token ids"),
        ({"prompts": [["a"]]}, "Prompt 0 holds 'a'; expected token ids"),
        ({"prompts": ["a\ud800>"]}, "Prompt 0 holds half of a surrogate pair"),
        ({"prompts": ["a>"], "adapter_names": "upper"}, "adapter_names is of type str; expected a list"),
        ({"prompts": ["a>"], "max_new_tokens": None}, "max_new_tokens is None; expected a whole number"),
        ({"prompts": ["a>"], "max_new_tokens": 2.0}, "max_new_tokens is 2.0; expected a whole number"),
        ({"prompts": ["a>"], "temperature": None}, "temperature is None; expected 0 .greedy. to"),
        ({"prompts": ["a>"], "temperature": "hot"}, "temperature is 'hot'; expected 0 .greedy. to"),
        ({"prompts": ["a>"], "temperature": float("nan")}, "temperature is nan; expected 0 .greedy. to"),
        ({"prompts": ["a>"], "top_p": [None]}, "top_p is None; expected more than 0"),
        ({"prompts": ["a>"], "adapter_errors": "retrun"}, "adapter_errors is 'retrun'; expected raise or return"),
        ({"prompts": ["a>"], "callback": "print"}, "callback is of type str; expected a function"),
        ({"prompts": ["a>"], "progress": "no"}, "progress is 'no'; expected True or False"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(model, arguments, message):
    with pytest.raises(InputError, match=message):
        model.generate(**arguments)


@pytest.mark.parametrize("value", ["no", 0, None])
def test_what_is_neither_true_nor_false_is_refused(model, tmp_path, value):
    with pytest.raises(InputError, match=r"pinned is .*; expected True or False"):
        model.pin_adapter("upper", value)
    for option in ("expand", "fold_scale", "force"):
        with pytest.raises(InputError, match=rf"{option} is .*; expected True or False"):
            model.save_adapter("upper", tmp_path / "out", **{option: value})


def test_no_prompts_give_no_answers(model):
    assert model.generate([]) == []


def test_batches_of_nearby_sizes_share_a_bucket(model):
    def shape(prompts: int, length: int, new: int) -> tuple:
        requests = [Request([1] * length, SamplingParams(max_new_tokens=new))] * prompts
        batch = PaddedBatch.make(requests)
        return batch.tokens.shape, batch.cache_length

    assert shape(5, 17, 9) == shape(8, 32, 9) == ((8, 32), 64)


def test_a_lent_bank_survives_later_loads(model):
    fn = model.functional(batch=1, max_length=16)
    model.load_adapter(data_folder() / "adapters" / "sort", "later")
    model.unload_adapter("later")
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(fn.bank))


def test_loads_from_one_thread_while_another_generates(model):
    """Every answer right, whatever the interleaving; the bank that a run holds is never reused under it."""
    failures = []

    def load_and_unload() -> None:
        try:
            for turn in range(8):
                model.load_adapter(data_folder() / "adapters" / "reverse", f"turn{turn}")
                model.unload_adapter(f"turn{turn}")
        except Exception as error:  # shown below; a thread's own exception is lost
            failures.append(error)

    loader = threading.Thread(target=load_and_unload)
    loader.start()
    while loader.is_alive():
        assert texts(model.generate(PROMPTS, NAMES, max_new_tokens=10)) == ANSWERS
    loader.join()
    assert failures == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nobody/nothing", r"There is no folder nobody/nothing"),
        ("a/b/c", "There is no folder a/b/c"),
        ("here/mistyped", "There is no folder here/mistyped"),  # the folder `here` stands, so it is no hub id
        (Path("nobody/nothing"), "There is no folder nobody/nothing"),
        ("x" * 5000, "There is no folder xxx"),
        (None, "The folder is None; give a path"),
        ("", "The folder is ''; give a path"),
    ],
)
def test_a_mistyped_path_is_not_asked_of_the_hub(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(JaxMoELoRAError, match=message):
        Model.from_pretrained(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": None}, "dtype is None"),
        ({"max_rank": 8.5}, "max_rank is 8.5; expected a whole number"),
        ({"max_adapters": None}, "max_adapters is None; expected a whole number"),
        ({"max_adapters": 0}, "max_adapters is 0; expected 1 to"),
        ({"adapter_memory": None}, "Size None is not understood"),
        ({"implementation": "fast"}, "implementation='fast' is unknown"),
        ({"implementation": "hopper"}, "implementation='hopper' cannot run this: it needs a GPU"),
    ],
)
def test_bad_arguments_of_loading_are_refused_before_a_weight_is_read(monkeypatch, arguments, message):
    monkeypatch.setattr(surface, "load_params", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=message):
        Model.from_pretrained(data_folder() / "model", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token_ids": None}, "token_ids are object"),
        ({"token_ids": [[1, 2], [3]]}, "token_ids is no array; expected rows of one length"),
        ({"token_ids": [[1.0]]}, "token_ids are float64"),
        ({"token_ids": [[99]]}, "token_ids lie outside 0 to 98"),
        ({"token_ids": [[1] * 100_000]}, "token_ids have 100000 tokens a row; the model has"),
        ({"token_ids": [[1, 2]], "lengths": [1.5]}, r"lengths are \[1.5\]; expected 1 whole numbers from 0 to 2"),
        ({"token_ids": [[1, 2]], "lengths": [3]}, "expected 1 whole numbers from 0 to 2"),
        ({"token_ids": [[1, 2]], "lengths": 2}, "expected 1 whole numbers from 0 to 2"),
    ],
)
def test_bad_arguments_of_logits_are_refused(model, arguments, message):
    with pytest.raises(InputError, match=message):
        model.logits(**arguments)


@pytest.mark.parametrize(
    ("batch", "length", "message"), [(1, 10**6, "max_length is 1000000; expected 1 to"), (1.0, 8, "batch is 1.0")]
)
def test_bad_arguments_of_functional_are_refused(model, batch, length, message):
    with pytest.raises(InputError, match=message):
        model.functional(batch, length)


@pytest.mark.parametrize("name", [["upper"], 3, b"upper"])
def test_a_name_that_is_no_text_is_refused(model, name):
    for use in (
        lambda: model.slots([name]),
        lambda: model.unload_adapter(name),
        lambda: model.generate(["a>"], [name]),
    ):
        with pytest.raises(AdapterNameError, match="is not a string; give an adapter's name"):
            use()
    with pytest.raises(AdapterNameError, match="not a string; choose another"):
        model.load_adapter(data_folder() / "adapters" / "sort", name)


def test_a_hub_id_that_cannot_be_had_is_one_sentence():
    with pytest.raises(CheckpointError, match="nobody/nothing is no local folder, and the hub did not give it"):
        Model.from_pretrained("nobody/nothing")
