"""Programs as they were lowered, kept for the next process.

jax's compilation cache keeps what XLA compiled, and finds it by the lowered program. To get that one, each process
traces the model and assembles its kernels in Python, which for a large model takes longer than all that follows. Here a
lowered program is a file, written with `jax.export`; XLA gets the same one whether it was read or just made.

A file is found by everything that tracing depends on: the sources of this library, the versions of jax and of cuDNN,
jax's options, the device, the tuned configs, static arguments and the types of arrays. Functions that are replaced in a
running process are not among these, so nothing is kept unless `JAX_MOE_LORA_PROGRAMS` names a folder; the commands do.
"""

import functools
import hashlib
import importlib
import os
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax import export

from jax_moe_lora.files.folders import whole_file
from pallas_kernels.backend import default_device, target_sms
from pallas_kernels.hopper import tuned_file

VARIABLE = "JAX_MOE_LORA_PROGRAMS"
"""Names the folder; without it, nothing is kept."""
SOURCES = ("jax_moe_lora", "pallas_kernels")
VERSIONS = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
NOT_OF_THE_PROGRAM = ("_cache", "_log", "_debug", "_pprint", "_transfer", "_mtls")
"""Parts of the names of jax's options that no program depends on."""
CUDNN = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaScaleBiasSoftmax")
"""Calls that jax does not keep stable from version to version. A kept program is of one version."""


def keeps(mesh: jax.sharding.Mesh | None) -> bool:
    """Whether programs are kept: a folder is named, jax keeps what is compiled, and the program is for one device.

    Args:
      mesh: the devices of the program; None for one.
    """
    return mesh is None and jax.config.jax_enable_compilation_cache and bool(os.environ.get(VARIABLE))


def kept[Result](
    function: Callable[..., Result],
    name: str,
    arrays: tuple[Any, ...],
    *,
    mesh: jax.sharding.Mesh | None = None,
    **static: Any,
) -> Result:
    """Inside of `jit`: `function(*arrays, **static)`, out of a file where it was lowered before.

    What comes out of a file has no gradient.

    Args:
      function: what to call. It returns a tree that `jax.export` can write.
      name: which of this library's functions it is.
      arrays: its arguments, trees of traced arrays.
      mesh: the devices. Programs for several are not kept.
      **static: options that `repr` tells apart.
    """
    call = functools.partial(function, **static)
    if not keeps(mesh):
        return call(*arrays)
    leaves, tree = jax.tree.flatten(arrays)
    key = _key(name, sorted(static.items()), tree, [jax.typeof(leaf) for leaf in leaves])
    path = Path(os.environ[VARIABLE]) / f"{key}.program"
    program = _read(path)
    if program is None:
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=leaf.weak_type) for leaf in leaves]
        program = _export(lambda *flat: call(*jax.tree.unflatten(tree, flat)), shapes)
        _write(path, program)
    return program.call(*leaves)


def _export(function: Callable[..., Any], shapes: list[jax.ShapeDtypeStruct]) -> export.Exported:
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in CUDNN]
    return export.export(jax.jit(function), disabled_checks=checks)(*shapes)


def _read(path: Path) -> export.Exported | None:
    """The program of a file; None where there is none, or one that another process did not finish."""
    try:
        program = export.deserialize(bytearray(path.read_bytes()))
    except Exception:  # whatever a broken file makes of the parser: the program is made anew
        return None
    if default_device().platform in ("gpu", "cuda"):
        importlib.import_module("jax.experimental.pallas.mosaic_gpu")  # tells kernels where their runtime library is
    return program


def _write(path: Path, program: export.Exported) -> None:
    """Writes the file; a folder that refuses only costs the next process its time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole_file(path, bytes(program.serialize()))
    except OSError:
        return


def _key(*parts: Any) -> str:
    """A name for all that the program depends on."""
    device = default_device()
    machine = (
        device.platform,
        getattr(device, "device_kind", ""),
        getattr(device, "compute_capability", ""),
        target_sms(),
    )
    named = [name for name in sorted(jax.config.values) if not any(part in name for part in NOT_OF_THE_PROGRAM)]
    options = [(name, getattr(jax.config, name, jax.config.values[name])) for name in named]
    text = repr((_sources(), _versions(), machine, _tuned(), options, parts))
    return hashlib.sha256(text.encode()).hexdigest()


def _tuned() -> tuple[str | None, bytes]:
    """The tuned file that is named; those of the package are among its sources."""
    named = os.environ.get(tuned_file.VARIABLE)
    return named, Path(named).read_bytes() if named and Path(named).is_file() else b""


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for package in SOURCES:
        folder = Path(str(importlib.import_module(package).__file__)).parent
        for path in sorted(_files(folder)):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix in (".py", ".json"))


@functools.cache
def _versions() -> tuple[str | None, ...]:
    return tuple(map(_version, VERSIONS))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
