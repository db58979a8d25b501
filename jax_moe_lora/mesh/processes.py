"""Several processes that run one model: how they find each other, agree, and end.

Every process runs the same programs in the same order, on its own devices. What only one of them knows or finds wrong
is exchanged, so that all do the same.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import combinations, count
from typing import Any

import jax
import numpy as np
from jax import lax
from jax._src import distributed  # its public part has no messages between processes
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_moe_lora.adapters.addressable import send
from jax_moe_lora.adapters.pool.agreement import Agreement, Alone
from jax_moe_lora.errors import InputError, JaxMoELoRAError, ProcessError
from jax_moe_lora.mesh.last_words import join

START_SECONDS = 20
SILENCE_SECONDS = 15
"""A process that the others have not heard of for so long has died to them."""
_SENTENCE = 800  # characters of another process's error
_WAIT_MS = 24 * 3600 * 1000  # jax ends a process that waits for one that has died
_exchanges = count()
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_seconds: int = START_SECONDS,
) -> None:
    """Joins the processes of a job, before anything else of jax is used.

    What is not given comes from the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and what
    these do not say from jax's own detection of Slurm, Kubernetes and MPI. From then on, a process whose job lost
    another one ends, with a sentence on standard error, in less than 30 seconds.

    Args:
      coordinator_address: HOST:PORT of process 0, which every process reaches.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      start_seconds: how long the others are waited for; the process ends some 5 seconds later.

    Raises:
      ProcessError: nothing says who the others are, or what says it is invalid.
    """
    address, size, number = _from_environment(coordinator_address, num_processes, process_id)
    # The CPU's collectives are gloo's; the option does nothing to a GPU's.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    words = join()
    named = "This process" if number is None else f"Process {number}"
    named += "" if size is None else f" of {size}"
    words.set(
        f"{named} stopped: the others did not all arrive within {start_seconds} s; see that each was started, has "
        "another process id, and reaches the coordinator."
    )
    try:
        jax.distributed.initialize(
            address,
            size,
            number,
            initialization_timeout=start_seconds,
            heartbeat_timeout_seconds=SILENCE_SECONDS,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        words.set("")
        reason = str(error).rstrip(".")
        raise ProcessError(
            f"The processes did not find each other: {reason}; give coordinator_address, num_processes and process_id, "
            f"or set {', '.join(_VARIABLES)}."
        ) from error
    words.set(
        f"Process {jax.process_index()} of {jax.process_count()} stopped: it was ended, or another process ended or "
        f"was silent for {SILENCE_SECONDS} s; look for the first error of any process, and start all of them again."
    )


def _from_environment(
    address: str | None, size: int | None, number: int | None
) -> tuple[str | None, int | None, int | None]:
    """What was given, else what the variables say."""
    texts = dict(zip(_VARIABLES, map(os.environ.get, _VARIABLES), strict=True))

    def whole(name: str) -> int | None:
        text = texts[name]
        if text is not None and not (text.isascii() and text.isdigit()):
            raise ProcessError(f"{name} is {text!r}; expected a whole number.")
        return None if text is None else int(text)

    size = whole(_VARIABLES[1]) if size is None else size
    number = whole(_VARIABLES[2]) if number is None else number
    if size is not None and number is not None and not 0 <= number < size:
        raise ProcessError(f"The process id is {number} of {size} processes; expected 0 to {size - 1}.")
    return address or texts[_VARIABLES[0]], size, number


def is_first() -> bool:
    """Whether this process is the one that prints: the first of several, or the only one."""
    return jax.process_index() == 0


def across(mesh: Mesh | None) -> bool:
    """Whether a mesh has devices of several processes.

    Args:
      mesh: the devices; None for the default one.
    """
    return isinstance(mesh, Mesh) and len({device.process_index for device in mesh.devices.flat}) > 1


def exchange(message: str) -> list[str]:
    """The messages of all processes, in their order. Each calls it at the same place of its program.

    They go through jax's coordinator, not through devices: nothing is compiled, and a process may come late.

    Args:
      message: this process's.
    """
    client, number = distributed.global_state.client, next(_exchanges)
    if client is None:
        raise ProcessError("This process has not joined others; call jax_moe_lora.mesh.processes.initialize first.")
    key = f"jax_moe_lora/{number}/"
    client.key_value_set(f"{key}{jax.process_index()}", message)
    messages = [client.blocking_key_value_get(f"{key}{process}", _WAIT_MS) for process in range(jax.process_count())]
    if number > 1:  # all have sent the last one, so all have read the one before
        client.key_value_delete(f"jax_moe_lora/{number - 2}/{jax.process_index()}")
    return messages


class Processes:
    """How several processes come to the same decisions (`adapters.pool.agreement.Agreement`)."""

    alone = False

    @contextmanager
    def all_or_none(self, value: Callable[[], Any] = lambda: None) -> Iterator[None]:
        """A block that fails in every process where it fails in one, and after which all have the same value.

        Args:
          value: what must be the same, asked for after the block.

        Raises:
          JaxMoELoRAError: the block's own error, or that of the first process where it failed.
          ProcessError: the values differ.
        """
        error: Exception | None = None
        try:
            yield
            same = hashlib.sha256(repr(value()).encode()).hexdigest()
        except Exception as problem:
            error, same = problem, ""
        outcomes = [json.loads(text) for text in exchange(json.dumps([same, *_described(error)]))]
        if error is not None:
            raise error
        for number, (_, name, sentence) in enumerate(outcomes):
            _raise(number, name, sentence)
        other = [number for number, (one, *_) in enumerate(outcomes) if one != same]
        if other:
            raise ProcessError(
                f"Process {jax.process_index()} was given something else than process {other[0]}; give every process "
                "the same arguments, prompts and files, in the same order."
            )

    def of_first(self, message: Callable[[], str]) -> str:
        """What the first process says.

        Args:
          message: it; only the first process is asked. Where that fails, it fails in all.
        """
        error, text = None, ""
        try:
            text = message() if is_first() else ""
        except Exception as problem:
            error = problem
        text, *described = json.loads(exchange(json.dumps([text, *_described(error)]))[0])
        if error is not None:
            raise error
        _raise(0, *described)
        return text


def agreement(mesh: Mesh | None) -> Agreement:
    """How the processes of a mesh agree.

    Args:
      mesh: the devices; None for the default one.
    """
    return Processes() if across(mesh) else Alone()


def _described(error: Exception | None) -> tuple[str, str]:
    """An error for other processes: its kind and its sentence; both empty without one."""
    if error is None:
        return "", ""
    sentence = " ".join(str(error).encode("ascii", "replace").decode().split())
    return type(error).__name__, sentence[:_SENTENCE] + ("..." if len(sentence) > _SENTENCE else "")


def _raise(number: int, name: str, sentence: str) -> None:
    """Another process's error, where it has one."""
    if name:
        raise _ERRORS.get(name, ProcessError)(f"Process {number}: {sentence}")


def _subclasses(kind: type[JaxMoELoRAError]) -> Iterator[type[JaxMoELoRAError]]:
    yield kind
    for sub in kind.__subclasses__():
        yield from _subclasses(sub)


_ERRORS = {kind.__name__: kind for kind in _subclasses(JaxMoELoRAError)}


def check_processes(mesh: Mesh) -> None:
    """Refuses a mesh that leaves some process without work.

    Args:
      mesh: the devices.

    Raises:
      InputError: with the number of devices that there are.
    """
    here = {device.process_index for device in mesh.devices.flat}
    if len(here) < jax.process_count():
        raise InputError(
            f"The mesh has devices of {len(here)} of {jax.process_count()} processes; give one over all "
            f"{len(jax.devices())} devices, or start fewer processes."
        )


def connect(mesh: Mesh) -> None:
    """Makes the devices of a mesh known to each other, along each of its axes and all combinations of them.

    The first sum over some devices waits 30 seconds for all of them on a CPU; here all processes are at the same place.

    Args:
      mesh: the devices.
    """
    names = [name for name, size in mesh.shape.items() if size > 1]
    for axes in (some for size in range(1, len(names) + 1) for some in combinations(names, size)):
        ones = everywhere(np.ones(1, np.float32), mesh)
        total = jax.shard_map(
            partial(lax.psum, axis_name=axes), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
        )
        program = jax.jit(total).lower(ones).compile()
        exchange("")
        with _quiet():
            jax.block_until_ready(program(ones))


@contextmanager
def _quiet() -> Iterator[None]:
    """Sends to standard error what gloo prints when it connects, so that answers have standard output to themselves."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays of the host, or of this process's default device, as arrays that each device of a mesh has whole.

    Args:
      tree: of arrays; those of several processes stay as they are.
      mesh: the devices; of one process, or None, the tree stays as it is.
    """
    if mesh is None or not across(mesh):
        return tree
    return jax.tree.map(partial(_everywhere, NamedSharding(mesh, P())), tree)


def _everywhere(placement: NamedSharding, leaf: Any) -> Any:
    if isinstance(leaf, jax.core.Tracer) or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return leaf
    return send(np.asarray(leaf), placement)
