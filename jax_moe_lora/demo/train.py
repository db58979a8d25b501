"""Trains the demo's model and adapters with transformers and PEFT: ``python -m jax_moe_lora.demo.train --out DIR``.

The base model is a Qwen3-MoE with a quarter of a million weights, and its tokens are single characters. It is trained
from scratch to copy strings of 1 to 10 characters: half of the strings are lower-case letters, half are any printable
characters except the separator. It is then frozen, and PEFT trains each adapter on one task, on lower-case strings of 3
to 8 letters. Strings whose CRC-32 is a multiple of eight (`tasks.is_held_out`) are never trained on. The table at the
end is measured on such strings only, with everything read back from disk.

The adapters differ in form, rank, scale and targets:

- ``upper``: rank 8, the experts' 3-D parameters.
- ``reverse``: rank 16, rsLoRA; attention, the router and the experts' 3-D parameters.
- ``sort``: rank 24; attention and the experts, with a pair of matrices per expert and projection, as PEFT wrote them
  with transformers 4. It is trained in the 3-D form and split exactly (`saving.split_experts`).
- ``shift``: rank 6, with the old names of the projections as targets. PEFT makes that rank 12 for the fused gate and
  up, which only ``rank_pattern`` and ``alpha_pattern`` say.

Two runs on one machine with the same versions and number of threads write the same weights, with ``--only`` too.
"""

import argparse
import json
import math
import random
import string
import time
from pathlib import Path

import peft
import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from jax_moe_lora.demo import tasks
from jax_moe_lora.demo.saving import save_adapter

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
CHARACTERS = "".join(map(chr, range(ord(" "), ord("~") + 1)))
PAD, BOS, EOS = 0, 1, 2
BASE_STEPS, BASE_RATE = 2500, 3e-3
BATCH = 192
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS_3D = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EXPERTS_2D = ["gate_proj", "up_proj", "down_proj"]
ATTENTION_ROUTER_EXPERTS = {"target_modules": ATTENTION, "target_parameters": ["mlp.gate.weight", *EXPERTS_3D]}
# name -> (PEFT's arguments, steps, learning rate)
ADAPTERS: dict[str, tuple[dict, int, float]] = {
    "upper": ({"r": 8, "lora_alpha": 16, "target_modules": [], "target_parameters": EXPERTS_3D}, 2000, 8e-3),
    "reverse": ({"r": 16, "lora_alpha": 8, "use_rslora": True} | ATTENTION_ROUTER_EXPERTS, 2500, 3e-3),
    "sort": ({"r": 24, "lora_alpha": 48, "target_modules": ATTENTION, "target_parameters": EXPERTS_3D}, 1000, 2e-3),
    "shift": ({"r": 6, "lora_alpha": 12, "target_modules": EXPERTS_2D}, 2750, 8e-3),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per printable ASCII character, which adds no special tokens."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS.values(), *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=256,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )


def build_model(vocab_size: int) -> Qwen3MoeForCausalLM:
    """The untrained base model; its hidden, query, expert and gate-and-up widths all differ (64, 128, 48, 96)."""
    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        norm_topk_prob=True,
        max_position_embeddings=256,
        initializer_range=0.06,
        router_aux_loss_coef=0.01,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = Qwen3MoeForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, max_length=None
    )
    return model


def training_strings(rng: random.Random, name: str) -> list[str]:
    """A batch of strings of the same length, none of them held out."""
    shortest, longest = (1, 10) if name == "base" else (tasks.MIN_LENGTH, tasks.MAX_LENGTH)
    length = shortest + int(rng.random() * (longest - shortest + 1))
    printable = CHARACTERS.replace(tasks.SEPARATOR, "")
    strings: list[str] = []
    while len(strings) < BATCH:
        alphabet = printable if name == "base" and rng.random() < 0.5 else string.ascii_lowercase
        text = tasks.random_string(rng, length, alphabet)
        if not tasks.is_held_out(text):
            strings.append(text)
    return strings


def fit(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, name: str, steps: int, rate: float) -> None:
    """Trains the trainable weights of `model` on task `name`; the loss counts the answer and the end of text."""
    rng = random.Random(name)
    is_base = name == "base"
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01 if is_base else 0.0)

    def schedule(step: int) -> float:
        return min(1, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for step in range(steps):
        texts = training_strings(rng, name)
        examples = [tasks.prompt(text) + tasks.TASKS[name](text) + SPECIAL_TOKENS["eos_token"] for text in texts]
        ids = torch.tensor(tokenizer(examples)["input_ids"])
        start = len(texts[0])  # the separator's position, where the first character of the answer is predicted
        output = model(input_ids=ids[:, :-1], output_router_logits=is_base)
        logits, answers = output.logits[:, start:], ids[:, start + 1 :]
        loss = functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        balance = 0.01 * output.aux_loss if is_base else 0.0  # keeps all experts in use
        optimizer.zero_grad()
        (loss + balance).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        scheduler.step()
        if (step + 1) % 500 == 0:
            exact = (logits.argmax(-1) == answers).all(1).float().mean()
            print(
                f"{name}: step {step + 1}, loss {loss:.4f}, exact answers with teacher forcing {exact:.3f}", flush=True
            )


def load_base(folder: Path) -> Qwen3MoeForCausalLM:
    """The base model from disk, with a plain loop over experts, which is the fastest at this size."""
    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")


@torch.no_grad()
def answer(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[str]:
    """Greedy answers; prompts of one length run together, so that nothing is padded."""
    answers: dict[str, str] = {}
    for length in sorted({len(text) for text in texts}):
        group = [text for text in texts if len(text) == length]
        ids = tokenizer([tasks.prompt(text) for text in group], return_tensors="pt")
        output = model.generate(**ids, max_new_tokens=tasks.MAX_LENGTH + 2)[:, length + 1 :]
        answers |= dict(zip(group, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True))
    return [answers[text] for text in texts]


def evaluate(out: Path, count: int) -> dict[str, dict[str, float]]:
    """The share of exact answers of the base model and of every adapter (rows) on every task, read back from `out`."""
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    texts = tasks.heldout_strings(count)
    table = {}
    for name in tasks.TASKS:
        model = load_base(out / "model")
        if name != "base":
            model = peft.PeftModel.from_pretrained(model, out / "adapters" / name)
        answers = answer(model.eval(), tokenizer, texts)
        table[name] = {
            other: sum(task(text) == given for text, given in zip(texts, answers, strict=True)) / count
            for other, task in tasks.TASKS.items()
        }
    return table


def train(out: Path, names: list[str]) -> dict[str, float]:
    """Trains and saves the parts `names` in `out`; returns the seconds that each took."""
    seconds = {}
    tokenizer = build_tokenizer()
    for name in names:
        started = time.perf_counter()
        torch.manual_seed(0)
        if name == "base":
            model = build_model(len(tokenizer))
            model.set_experts_implementation("eager")
            fit(model, tokenizer, name, BASE_STEPS, BASE_RATE)
            model.save_pretrained(out / "model", max_shard_size="500KB")
            tokenizer.save_pretrained(out / "model")
        else:
            arguments, steps, rate = ADAPTERS[name]
            model = peft.get_peft_model(load_base(out / "model"), peft.LoraConfig(**arguments))
            fit(model, tokenizer, name, steps, rate)
            per_expert = {key: arguments.get(key) for key in ("r", "lora_alpha")} | {
                "target_modules": ATTENTION + EXPERTS_2D
            }
            save_adapter(model, out / "adapters" / name, per_expert if name == "sort" else None)
        seconds[name] = round(time.perf_counter() - started, 1)
    return seconds


def main() -> None:
    """Trains, saves, reads back, evaluates, and writes ``training_report.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data", help="folder to write")
    everything = list(tasks.TASKS)
    parser.add_argument(
        "--only", nargs="*", choices=everything, default=everything, help="parts to train, the base first"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report_file, count = options.out / "training_report.json", 512
    seconds = json.loads(report_file.read_text())["seconds"] if report_file.exists() else {}
    seconds |= train(options.out, options.only)
    table = evaluate(options.out, count)
    report = {
        "exact_match": table,
        "heldout_strings": count,
        "seconds": seconds,
        "threads": options.threads,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft, tokenizers)},
    }
    report_file.write_text(json.dumps(report, indent=2) + "\n")
    print(" " * 8 + "".join(f"{task:>9}" for task in tasks.TASKS))
    for name, row in table.items():
        print(f"{name:8}" + "".join(f"{share:9.3f}" for share in row.values()))


if __name__ == "__main__":
    main()
