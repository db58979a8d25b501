"""Kills training at random moments; a run must end with the same bits.

``python tests/support/kill_training.py --kills 20``

One process trains two of the demo's adapters, another goes on where it died, until a run is complete. One moment in
four is uniform over the life of a process that nobody kills, which is its start for the most part; the others come
within a second after its first checkpoint, so that steps, checkpoints, their clean-up and the export are hit.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from jax_moe_lora.demo.run import data_folder
from jax_moe_lora.demo.tasks import TASKS, is_held_out, prompt, random_string

NAMES = ("upper", "shift")


def write_task(file: Path, name: str, count: int = 200, seed: int = 0) -> Path:
    """Strings that are not held out, with the task's answers."""
    rng = random.Random(seed)
    texts = (random_string(rng, rng.randint(3, 8)) for _ in range(2 * count))
    lines = [{"prompt": prompt(text), "completion": TASKS[name](text)} for text in texts if not is_held_out(text)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines[:count]))
    return file


def command(folder: Path, out: Path, steps: int, *more: str) -> list[str]:
    """Training of `NAMES` on data in `folder`, with a checkpoint after every step."""
    data = [part for name in NAMES for part in ("--adapter", f"{name}={folder / name}.jsonl")]
    sizes = ["--rank", "2", "--batch-size", "2", "--sequence-length", "24", "--padding", "--dtype", "float32"]
    fixed = ["--steps", str(steps), "--save-every", "1", "--lr", "1e-2", "--warmup", "3"]
    base = [sys.executable, "-m", "jax_moe_lora.cli.main", "train", "--model", str(data_folder() / "model")]
    return [*base, *data, *sizes, *fixed, "--out", str(out), *more]


def start(folder: Path, out: Path, steps: int) -> subprocess.Popen:
    """A process that begins the run, or goes on with it; compiled programs are kept beside the data."""
    own = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command(folder, out, steps, "--resume"), env={**os.environ, **own}, **pipes)


def finish(process: subprocess.Popen) -> None:
    """Raises where the process does not end well by itself."""
    said, _ = process.communicate()
    if process.returncode:
        raise AssertionError(f"exit code {process.returncode}: {said}")


def kill(process: subprocess.Popen, when: Callable[[], bool]) -> bool:
    """Kills the process as soon as `when()`; whether it came to that before the process had ended."""
    while process.poll() is None and not when():
        time.sleep(0.002)
    process.kill()
    said, _ = process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(f"exit code {process.returncode}: {said}")
    return process.returncode == -signal.SIGKILL


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of every file of every adapter, and of the losses that the run wrote down."""
    files = [path for name in NAMES for path in sorted((out / name).iterdir())]
    found = {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    steps = json.dumps([(line["step"], line["adapters"]) for line in lines])
    return found | {"metrics": hashlib.sha256(steps.encode()).hexdigest()}


def held(out: Path) -> list[str]:
    """The checkpoints, also the unfinished ones."""
    return sorted(path.name for path in (out / "checkpoints").glob("*"))


def at_some_time(life: float, rng: random.Random) -> Callable[[], bool]:
    deadline = time.monotonic() + rng.uniform(0, life)
    return lambda: time.monotonic() > deadline


def some_time_after_a_checkpoint(out: Path, rng: random.Random, seconds: float = 1.0) -> Callable[[], bool]:
    """Whether a time of at most `seconds` has passed since something happened to the checkpoints."""
    before, delay, deadline = held(out), rng.uniform(0, seconds), list[float]()

    def when() -> bool:
        if not deadline and len(held(out)) > 1 and held(out) != before:
            deadline.append(time.monotonic() + delay)
        return bool(deadline) and time.monotonic() > deadline[0]

    return when


def at_any_moment(folder: Path, kills: int, steps: int, seed: int) -> int:
    """Kills `kills` processes, and returns how many runs that took; raises where one ends with other bits."""
    for name in NAMES:
        write_task(folder / f"{name}.jsonl", name)
    finish(start(folder, folder / "first", steps))  # compiles
    began = time.monotonic()
    finish(start(folder, folder / "whole", steps))
    life, expected = time.monotonic() - began, digests(folder / "whole")
    print(f"a process lives {life:.1f} s", flush=True)
    assert digests(folder / "first") == expected
    rng, done, runs = random.Random(seed), 0, 0
    while done < kills:
        out, died = folder / f"run-{runs}", True
        while died:
            when = some_time_after_a_checkpoint(out, rng) if rng.random() < 0.75 else at_some_time(life, rng)
            died = kill(start(folder, out, steps), when if done < kills else lambda: False)
            done += died
            print(f"{'killed' if died else 'ended'}, {done} kills so far; checkpoints {held(out)}", flush=True)
        assert digests(out) == expected, f"{out} has other bits"
        runs += 1
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = at_any_moment(Path(folder), options.kills, options.steps, options.seed)
    print(f"{options.kills} kills in {runs} runs: the same bits as a run that nobody killed")


if __name__ == "__main__":
    main()
