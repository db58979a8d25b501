"""Seconds that starting takes, of the processor and by the clock: `python tests/support/measure_startup.py`.

Medians of five processes each, in turns, so that other work on the machine slows all cases alike; one more process
before them fills the caches of bytecode.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO = "jax_moe_lora/demo/data"
STATEMENTS = ("import jax", "import jax_moe_lora", "from jax_moe_lora import Model")
COMMANDS = (
    "--help",
    "--version",
    f"inspect {DEMO}/model",
    f"inspect {DEMO}/adapters/sort",
    f"validate {DEMO}/adapters/sort --model {DEMO}/model",
)
RUNS = 5


def seconds(root: Path, code: str, arguments: list[str]) -> tuple[float, float]:
    """(of the processor, by the clock) of one process in the tree at `root`."""
    began = time.perf_counter()
    command, environment = [sys.executable, "-c", code, *arguments], {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, _, used = os.wait4(process.pid, 0)
    return used.ru_utime + used.ru_stime, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="Another tree to measure.")
    parser.add_argument("--main", default="jax_moe_lora.cli.main", help="The module of that tree's `main`.")
    options = parser.parse_args()
    run = f"import sys; sys.argv[0] = 'jax-moe-lora'; from {options.main} import main; main()"
    cases = {code: (code, []) for code in STATEMENTS} | {
        f"jax-moe-lora {line}": (run, line.split()) for line in COMMANDS
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(1 + RUNS):
        for name, case in cases.items():
            taken[name].append(seconds(options.root.resolve(), *case))
    print(f"{'processor':>10}{'clock':>8}  seconds, medians of {RUNS}")
    for name, runs in taken.items():
        processor, clock = (statistics.median(column) for column in zip(*runs[1:], strict=True))
        print(f"{processor:10.2f}{clock:8.2f}  {name}")


if __name__ == "__main__":
    main()
