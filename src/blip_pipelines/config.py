"""One strict reader from plain parameters (YAML, JSON) to frozen dataclasses.

The dataclasses stand beside what they configure. A key nobody knows is an error that names its
place and the nearest known key: a misspelt parameter must never be silently ignored.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")


class ConfigError(ValueError):
    """A parameter that is unknown, missing or of the wrong kind; the message says which and what to do."""


def speed_only(default: Any) -> Any:
    """A dataclass field that changes how fast a job runs but not one bit of its result.

    Such fields (workers, logging, checkpoint interval) stay out of a job's fingerprint.
    """
    return dataclasses.field(default=default, metadata={"speed_only": True})


def read(kind: type[T], values: Any, where: str) -> T:
    """Turn nested plain values into the dataclass `kind`.

    Args:
        kind: a frozen dataclass; fields may be dataclasses, lists, tuples, dicts, optionals, literals.
        values: mapping of plain YAML values.
        where: dotted name of the block, for messages ("med_pretraining.optimizer").

    Raises:
        ConfigError: on an unknown or missing key, or a value of the wrong kind.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a block of keys, found {values!r}")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(fields))}"
            raise ConfigError(f"{where}.{key}: unknown parameter; {hint}")
    hints = typing.get_type_hints(kind)
    found = {}
    for name, field in fields.items():
        if name in values:
            found[name] = _convert(hints[name], values[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}.{name}: missing parameter; add it to the block '{where}'")
    return kind(**found)


def arithmetic(config: Any) -> Any:
    """The plain values of a config that change results: everything but `speed_only` fields."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {
            field.name: arithmetic(getattr(config, field.name))
            for field in dataclasses.fields(config)
            if not field.metadata.get("speed_only")
        }
    if isinstance(config, Mapping):
        return {key: arithmetic(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [arithmetic(value) for value in config]
    return config


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [option for option in args if option is not type(None)]
        for option in options[:-1]:
            try:
                return _convert(option, value, where)
            except ConfigError:
                continue
        return _convert(options[-1], value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(repr, args))}")
        return value
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: expected a list, found {value!r}")
        if origin is tuple and args and args[-1] is not Ellipsis:
            if len(value) != len(args):
                raise ConfigError(f"{where}: expected {len(args)} values, found {len(value)}")
            return tuple(
                _convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(args, value, strict=True))
            )
        return origin(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a block of keys, found {value!r}")
        return {_convert(args[0], key, where): _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return read(hint, value, where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        try:  # YAML reads 1e-4 as text
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where}: expected {hint.__name__}, found {value!r}")
    return value
