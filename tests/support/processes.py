"""Several processes on this machine that run one script, found by each other through the usual variables."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from support import ROOT

HANGS = 3600  # seconds: only a process that hangs takes so long


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(number: int, count: int, port: int, devices: int = 1) -> dict[str, str]:
    """What tells a process which one of how many it is."""
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }


def start(arguments: Sequence[str], variables: Mapping[str, str]) -> subprocess.Popen[str]:
    """Python with these arguments, on the CPU."""
    common = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | common | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outputs(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each, once all have ended."""
    results: dict[int, tuple[int, str, str]] = {}

    def wait(number: int) -> None:
        try:
            out, err = processes[number].communicate(timeout=HANGS)
        except subprocess.TimeoutExpired:
            processes[number].kill()
            out, err = processes[number].communicate()
        results[number] = processes[number].returncode, out, err

    threads = [threading.Thread(target=wait, args=[number]) for number in range(len(processes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[number] for number in range(len(processes))]


def run_processes(count: int, devices: int, module: str, *arguments: str) -> list[dict[str, Any]]:
    """The JSON object that each process prints last."""
    port = free_port()
    command = ["-m", f"support.{module}", *arguments]
    started = [start(command, environment(number, count, port, devices)) for number in range(count)]
    reports = []
    ended = outputs(started)
    assert [code for code, _, _ in ended] == [0] * count, "\n".join(err[-3000:] for _, _, err in ended)
    for _, out, _ in ended:
        reports.append(json.loads(out.splitlines()[-1]))
    return reports
