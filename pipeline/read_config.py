"""From YAML to dataclasses: types checked, keys known, every error a line. What keys there are, config.py says."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal, Union

import yaml

from pipeline.errors import ConfigError


def apply(data: dict[str, Any], override: str) -> None:
    """Puts one `key.path=value` from the command line into what a file held; the value is YAML too."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: an override is written key.path=value, for example store.budget=10%")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"{override!r}: the value is not YAML; quote it") from None
    *parents, last = key.split(".")
    for parent in parents:
        if data.get(parent) is None:
            data[parent] = {}
        data = data[parent]
        if not isinstance(data, dict):
            raise ConfigError(f"{override!r}: {parent} holds a value, not keys")
    data[last] = value


def build(cls: type, data: Any, source: str, at: str = "") -> Any:
    """A dataclass from plain data, with dataclasses in it.

    A field's metadata may hold `read`: a function from what YAML made of a value to what the field takes; raises ValueError.

    Args:
        source: for messages.
        at: where in the source the data stands, "" for all of it.

    Raises:
        ConfigError: an unknown key, a missing one, or a wrong type.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: {at or 'the file'} must hold keys, found {data!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean {_join(at, near[0])!r}?" if near else f"known: {', '.join(fields)}"
            raise ConfigError(f"{source}: unknown key {_join(at, key)!r}; {hint}")
    values = {}
    for name, f in fields.items():
        if name in data:
            try:
                value = f.metadata.get("read", lambda value: value)(data[name])
            except ValueError as error:
                raise ConfigError(f"{source}: {_join(at, name)!r} is {data[name]!r}: {error}") from None
            values[name] = _convert(hints[name], value, source, _join(at, name))
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{source}: {_join(at, name)!r} is missing")
    return cls(**values)


def _convert(hint: Any, value: Any, source: str, at: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, source, at)
    if not _fits(hint, value):
        raise ConfigError(f"{source}: {at!r} is {value!r}; it must be {_describe(hint)}")
    return float(value) if hint is float else value


def _fits(hint: Any, value: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(arg, value) for arg in args)
    if origin is Literal:
        return value in args
    if origin is list:
        return isinstance(value, list) and all(_fits(args[0], item) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(args[0], k) and _fits(args[1], v) for k, v in value.items())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(str(arg) for arg in args) if len(args) > 1 else repr(args[0])
    if origin is list:
        return f"a list of {_describe(args[0])}" if args[0] is str else "a list of whole numbers"
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null", dict: "keys"}
    return names.get(origin or hint, str(hint))


def _join(at: str, key: object) -> str:
    return f"{at}.{key}" if at else str(key)
