"""Settings as dataclasses: from YAML and `section.key=value`, checked, described."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

REQUIRED: Any = dataclasses.MISSING


def setting(
    default: Any,
    meaning: str,
    *,
    choices: Sequence[Any] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    path: bool = False,
) -> Any:
    """A field, its meaning and its range: `minimum` and `maximum` belong to it, the others not.

    `path`: a leading ~ is the home folder.
    """
    limits = {
        "meaning": meaning,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "below": below,
        "path": path,
    }
    if default is REQUIRED:
        return dataclasses.field(metadata=limits)
    return dataclasses.field(default=default, metadata=limits)


class Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, where YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def apply_override(values: dict[str, Any], override: str, problems: list[str]) -> None:
    """Set what `section.key=value` says in nested `values`; a mistake is added to `problems`."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        problems.append(f"{override!r}: expected section.key=value, for example train.epochs=5")
        return
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    *sections, name = key.split(".")
    place: Any = values
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            problems.append(f"{key}: {section} is not a section; it holds {place!r}")
            return
    place[name] = value


def build(
    kind: type, values: Any, prefix: str, problems: list[str], typed: Mapping[str, str]
) -> Any:
    """An instance of dataclass `kind` from nested `values`, or None where one cannot be used.

    `problems` get those, keys that are missing and keys that are unknown: each starts with the
    dotted key; `prefix` is that of the section. `typed`: by dotted keys, the words that values of
    the command line were read from.
    """
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        problems.append(f"{prefix.rstrip('.')}: expected a section with keys, found {values!r}")
        return None
    fields = {field.name: field for field in dataclasses.fields(kind)}
    annotations = typing.get_type_hints(kind)
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            if not near and not prefix:  # it may be that of a section
                near = [key for key in _keys(kind) if key.rpartition(".")[2] == name][:1]
            hint = f"did you mean {prefix}{near[0]}?" if near else f"valid: {', '.join(fields)}"
            problems.append(f"{prefix}{name}: unknown key; {hint}")
    given: dict[str, Any] = {}
    usable = True
    for name, field in fields.items():
        key, annotation, before = f"{prefix}{name}", annotations[name], len(problems)
        if dataclasses.is_dataclass(annotation):
            given[name] = build(
                typing.cast(type, annotation), values.get(name), f"{key}.", problems, typed
            )
            usable &= given[name] is not None
        elif name in values:
            given[name] = _value(
                key, values[name], annotation, field.metadata, problems, typed.get(key)
            )
            usable &= len(problems) == before
        elif field.default is dataclasses.MISSING:
            problems.append(f"{key}: missing; {field.metadata['meaning']}")
            usable = False
    return kind(**given) if usable else None


def _keys(kind: type, prefix: str = "") -> Iterator[str]:
    """The dotted keys of all settings."""
    annotations = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        annotation = annotations[field.name]
        if dataclasses.is_dataclass(annotation):
            yield from _keys(typing.cast(type, annotation), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def _value(
    key: str,
    value: Any,
    annotation: Any,
    limits: Mapping[str, Any],
    problems: list[str],
    typed: str | None = None,
) -> Any:
    """`value` coerced to `annotation`, checked against `limits`; it was read from `typed`."""
    if typing.get_origin(annotation) is tuple:
        (kind, *more) = typing.get_args(annotation)
        length = None if more == [...] else 1 + len(more)
        if not isinstance(value, list) or length not in (None, len(value)):
            expected_list = "a list" if length is None else f"a list of {length} values"
            problems.append(f"{key}: expected {expected_list}, as in [a, b], found {value!r}")
            return value
        if kind is str:  # names may be numbers
            value = [str(item) if type(item) is int else item for item in value]
        return tuple(_value(key, item, kind, limits, problems) for item in value)
    kinds = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    if value is None and types.NoneType in kinds:
        return None
    kind = next(k for k in kinds if k is not types.NoneType)
    # YAML reads `no` as false, `1e-4` as a string and `3` as an integer; the annotation decides.
    if kind is str and value is False and limits["choices"] and "no" in limits["choices"]:
        value = "no"
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)
        except ValueError:
            pass
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        optional = " or null" if types.NoneType in kinds else ""
        expected = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        hint = ""
        if kind is str and value is not None:  # YAML reads 2024 as a number, and off as false
            quoted = "it in quotes" if typed is None else f"'\"{typed}\"'"
            hint = f"; for the text, write {quoted}"
        found = "nothing" if value is None else repr(value)
        problems.append(f"{key}: expected {expected[kind]}{optional}, found {found}{hint}")
        return value
    if limits["path"]:
        value = os.path.expanduser(value)
    choices, minimum, maximum = limits["choices"], limits["minimum"], limits["maximum"]
    above, below = limits["above"], limits["below"]
    if kind is float and not math.isfinite(value):
        problems.append(f"{key}: expected a finite number, found {value!r}")
    elif choices is not None and value not in choices:
        near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        listing = ", ".join(str(choice) for choice in choices)
        problems.append(f"{key}: expected one of {listing}, found {value!r}{hint}")
    elif minimum is not None and not value >= minimum:
        problems.append(f"{key}: expected at least {minimum}, found {value!r}")
    elif maximum is not None and not value <= maximum:
        problems.append(f"{key}: expected at most {maximum}, found {value!r}")
    elif below is not None and not value < below:
        problems.append(f"{key}: expected less than {below}, found {value!r}")
    elif above is not None and not value > above:
        problems.append(f"{key}: expected more than {above}, found {value!r}")
    return value


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


class _Dumper(yaml.SafeDumper):
    """Writes tuples as lists."""


_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(value))


def as_yaml(values: Any) -> str:
    """Settings as YAML, in the order they have."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def describe(kind: type) -> str:
    """Every setting of dataclass `kind` as a Markdown table."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    lines += _rows(kind, "")
    return "\n".join(lines) + "\n"


def _in_a_line(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_in_a_line, value))}]"
    return as_yaml(value).split("\n")[0]


def _rows(kind: type, prefix: str) -> Iterator[str]:
    annotations = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        key, annotation = f"{prefix}{field.name}", annotations[field.name]
        if dataclasses.is_dataclass(annotation):
            yield from _rows(typing.cast(type, annotation), f"{key}.")
            continue
        required = field.default is dataclasses.MISSING
        default = "" if required else _in_a_line(field.default)
        limits = {name: field.metadata[name] for name in ("minimum", "maximum", "above", "below")}
        words = [f"{name} {limit}" for name, limit in limits.items() if limit is not None]
        meaning = field.metadata["meaning"]
        if field.metadata["choices"]:
            named = [str(choice) for choice in field.metadata["choices"]]
            if not all(f"{name}:" in meaning for name in named):
                words.append("one of " + ", ".join(named))
        meaning += f" ({'; '.join(words)})" * bool(words)
        yield f"| `{key}` | {_type_name(annotation)} | {default or 'required'} | {meaning} |"


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is tuple:
        kind, *more = typing.get_args(annotation)
        number = "" if more == [...] else f"{1 + len(more)} "
        return f"{number}{_type_name(kind)}s"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    kinds = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    return " or ".join("null" if kind is types.NoneType else names[kind] for kind in kinds)
