"""Tokenizers: what a checkpoint's file says of the model is obeyed, what it says of who saved it is not."""

import json

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

from jax_moe_lora.files.tokenizer import Tokenizer

WORDS = {"[PAD]": 0, "<s>": 1, "</s>": 2, "[gMASK]": 3, "a": 4, "b": 5, "c": 6}
BOS, EOS, MASK, A, B, C = 1, 2, 3, 4, 5, 6


def letters(template: str = "$A") -> FastTokenizer:
    """A token a letter; `template` says which special tokens stand around a text."""
    tokenizer = FastTokenizer(WordLevel(dict(WORDS), unk_token="[PAD]"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.add_special_tokens(["[PAD]", "<s>", "</s>", "[gMASK]"])
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=list(WORDS.items())[:4])
    return tokenizer


def saved(tokenizer: FastTokenizer, folder) -> Tokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def test_truncation_and_padding_of_whoever_saved_the_file_are_reset(tmp_path):
    tokenizer = letters()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=32)
    read = saved(tokenizer, tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"]["max_length"] == 2
    assert read.encode("abc") == [A, B, C]
    assert read.encode_pair("a", "bc") == ([A], [B, C])


@pytest.mark.parametrize(
    ("template", "text", "tokens"),
    [
        ("<s> $A", "ab", [BOS, A, B]),
        ("<s> $A", "<s>ab", [BOS, A, B]),
        ("<s> $A", "<s><s>ab", [BOS, BOS, A, B]),  # the text's own two
        ("<s> $A", "a<s>b", [BOS, A, BOS, B]),
        ("<s> $A", "<s>", [BOS]),
        ("<s> $A", "", [BOS]),
        ("$A", "<s>ab", [BOS, A, B]),
        ("<s> $A </s>", "<s>ab", [BOS, A, B, EOS]),
        ("<s> $A </s>", "<s>ab</s>", [BOS, A, B, EOS]),
        ("<s> $A </s>", "<s>", [BOS, EOS]),
        ("<s> $A </s>", "</s>", [BOS, EOS]),
        ("[gMASK] <s> $A", "[gMASK]<s>a", [MASK, BOS, A]),
        ("[gMASK] <s> $A", "<s>a", [MASK, BOS, BOS, A]),  # half of what stands before a text is not the whole
    ],
)
def test_text_that_begins_with_bos_gets_no_second_one(tmp_path, template, text, tokens):
    assert saved(letters(template), tmp_path).encode(text) == tokens


def test_training_lines_get_no_second_bos_either(tmp_path):
    read = saved(letters("<s> $A"), tmp_path)
    assert read.encode_pair("<s>a", "bc") == read.encode_pair("a", "bc") == ([BOS, A], [B, C])
    assert read.encode("<s>ab", add_special_tokens=False) == [BOS, A, B]
    assert read.encode("ab", add_special_tokens=False) == [A, B]


@pytest.mark.parity
def test_a_file_is_read_as_transformers_reads_it(tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer = letters("<s> $A")
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=32)
    read = saved(tokenizer, tmp_path)
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in ("", "a", "abcabc", "a<s>b"):
        assert read.encode(text) == reference(text)["input_ids"]
