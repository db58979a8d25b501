"""Dataclasses as pytrees that `jax.export` can write to a file and read back.

An exported function keeps the tree of its arguments. jax writes tuples, lists and dicts by itself, and asks to be told
about every other type.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import Field, fields, is_dataclass
from functools import partial
from typing import Any, get_args

import jax
from jax import export

_names: set[str] = set()


def pytree[T](cls: type[T]) -> type[T]:
    """A class decorator: `jax.tree_util.register_dataclass`, and registered with `jax.export` as well.

    Static fields are written as JSON. They may hold numbers, strings, None, tuples, and the frozen dataclasses that
    their annotations name.

    Args:
      cls: a frozen dataclass. Its name identifies it in files, so no two such classes of a package share one.
    """
    jax.tree_util.register_dataclass(cls)
    name = f"{cls.__module__.split('.')[0]}.{cls.__name__}"
    if name not in _names:  # a module that is loaded a second time, as notebooks do
        _names.add(name)
        export.register_pytree_node_serialization(
            cls,
            serialized_name=name,
            serialize_auxdata=lambda static: json.dumps(_encode(static)).encode(),
            deserialize_auxdata=partial(_decode_static, cls),
            from_children=partial(_from_children, cls),
        )
    return cls


def _decode_static(cls: type, data: bytes | bytearray) -> tuple[Any, ...]:
    known = {part.__name__: part for field in _static(cls) for part in _dataclasses(field.type)}
    return _decode(json.loads(bytes(data)), known)


def _from_children(cls: type, static: Iterable[Any], children: Iterable[Any]) -> Any:
    """An instance whose children are placeholders, which `__init__` need not accept."""
    instance: Any = object.__new__(cls)
    dynamic = (field for field in fields(cls) if not field.metadata.get("static"))
    for group, values in ((_static(cls), static), (dynamic, children)):
        for field, value in zip(group, values, strict=True):
            object.__setattr__(instance, field.name, value)
    return instance


def _static(cls: type) -> list[Field]:
    return [field for field in fields(cls) if field.metadata.get("static")]


def _dataclasses(annotation: Any) -> Iterator[type]:
    """The dataclasses that an annotation names, and those that their fields name."""
    if isinstance(annotation, type) and is_dataclass(annotation):
        yield annotation
        parts = [field.type for field in fields(annotation)]
    else:
        parts = list(get_args(annotation))
    for part in parts:
        yield from _dataclasses(part)


def _encode(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {
            "type": type(value).__name__,
            "fields": {f.name: _encode(getattr(value, f.name)) for f in fields(value)},
        }
    if isinstance(value, tuple):
        return [_encode(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"A static field holds {value!r}, which has no form in an exported file.")


def _decode(value: Any, known: dict[str, type]) -> Any:
    if isinstance(value, list):
        return tuple(_decode(part, known) for part in value)
    if isinstance(value, dict):
        return known[value["type"]](**{name: _decode(part, known) for name, part in value["fields"].items()})
    return value
