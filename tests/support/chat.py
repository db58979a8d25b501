"""Chat templates with the traits of those that checkpoints bring, and a tokenizer of one token a character for them."""

import json
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from jax_moe_lora.files.tokenizer import Tokenizer

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<unk>"]
CHARACTERS = ["\n", *map(chr, range(32, 127))]

_TURN = "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = "{{ bos_token }}{% for message in messages %}" + _TURN + "{% endfor %}" + _PROMPT
MARKED = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message.content | trim }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}" + _TURN + "{% endif %}{% endfor %}" + _PROMPT
)
# Reasoning is written in the last turn and removed from all before.
REASONING = (
    "{% for message in messages %}{% if message.role == 'assistant' and loop.last %}<|im_start|>assistant\n"
    "<think>{{ message.reasoning_content or '' }}</think>{{ message.content }}<|im_end|>\n"
    "{% else %}" + _TURN + "{% endif %}{% endfor %}" + _PROMPT
)
# The prompt asks for reasoning, which the answers that it writes do not have.
ASKS_FOR_REASONING = PLAIN.removesuffix(_PROMPT) + _PROMPT.replace("assistant\n", "assistant\n<think>")
WITHOUT_END = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

HELLO = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ciao"},
]


def save_tokenizer(folder: Path, template: str | None) -> Tokenizer:
    """A folder with a tokenizer of single characters, and this template in `chat_template.jinja`."""
    tokenizer = FastTokenizer(
        WordLevel({token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False, "rstrip": False}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": eos | {"single_word": False},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(folder)


def spelled(tokens) -> str:
    """The text of token ids, special tokens included."""
    return "".join([*SPECIAL, *CHARACTERS][int(token)] for token in tokens)
