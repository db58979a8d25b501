"""As a new user would: chat data, two adapters from the command line, both served in one batch, compared with PEFT."""

import json
import random
import shutil
import sys

import numpy as np
import pytest

from jax_moe_lora import Model
from jax_moe_lora.cli.main import main
from jax_moe_lora.demo.run import data_folder
from support.layers import assert_close

# transformers warns of its own deprecated names when PEFT uses them.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.parity,
    pytest.mark.optimised,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
EOS = 2
TASKS = {"loud": str.upper, "back": lambda text: text[::-1]}


def conversations(name: str, count: int) -> list[dict]:
    """Lines of two questions and their answers."""
    rng = random.Random(name)
    lines = []
    for _ in range(count):
        texts = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 4))) for _ in range(2)]
        turns = [[{"role": "user", "content": t}, {"role": "assistant", "content": TASKS[name](t)}] for t in texts]
        lines.append({"messages": [*turns[0], *turns[1]], "id": len(lines)})
    return lines


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The demo's model with a chat template, and a run of 200 lines of chat for each of two adapters."""
    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(data_folder() / "model", folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    for name in TASKS:
        lines = conversations(name, 200)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = [part for name in TASKS for part in ("--adapter", f"{name}={folder / name}.jsonl")]
    sizes = ["--epochs", "4", "--batch-size", "8", "--sequence-length", "96", "--dtype", "float32", "--rank", "8"]
    rates = ["--lr", "1e-2", "--warmup", "5", "--targets", "gate,up,down,q,v"]
    where = ["--model", str(folder / "model"), "--out", str(folder / "run"), "--extra-columns", "ignore"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["jax-moe-lora", "train", *where, *data, *sizes, *rates])
        with pytest.raises(SystemExit) as exit:
            main()
    assert not exit.value.code
    return folder


def test_adapters_trained_on_chat_are_served_mixed_and_give_the_logits_of_peft(folders):
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    steps = [json.loads(line) for line in (folders / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in TASKS:
        assert steps[-1]["adapters"][name]["loss"] < steps[0]["adapters"][name]["loss"] / 2
    model = Model.from_pretrained(folders / "model", dtype="float32")
    for name in TASKS:
        model.load_adapter(folders / "run" / name, adapter_name=name)
    asked = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}, {"role": "user", "content": text}]
        for text in ("abcd", "hag")
    ]
    batch = [(messages, name) for messages in asked for name in (*TASKS, None)]
    theirs = AutoTokenizer.from_pretrained(folders / "model")
    prompts = [model.tokenizer.encode_messages(messages) for messages, _ in batch]
    assert prompts == [
        theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) for messages, _ in batch
    ]
    width = max(map(len, prompts))
    padded = np.array([ids + [0] * (width - len(ids)) for ids in prompts])
    found = np.asarray(model.logits(padded, [name for _, name in batch], [len(ids) for ids in prompts]))
    base = lambda: AutoModelForCausalLM.from_pretrained(folders / "model", dtype=torch.float32)  # noqa: E731
    served = {name: peft.PeftModel.from_pretrained(base(), folders / "run" / name).eval() for name in TASKS}
    served[None] = base().eval()
    answers = model.generate([messages for messages, _ in batch], [name for _, name in batch], max_new_tokens=4)
    for row, (ids, (_, name)) in enumerate(zip(prompts, batch, strict=True)):
        with torch.no_grad():
            expected = served[name](torch.tensor([ids])).logits[0].numpy()
            written = served[name].generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0, len(ids) :]
        assert_close(found[row, : len(ids)], expected, 1e-5)
        assert answers[row].token_ids == [token for token in written.tolist() if token != EOS]
