"""Configuration and recipes: TOML read into frozen types, every fault reported at once."""

from __future__ import annotations

import difflib
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from edge_ll.errors import ConfigError


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every configuration table: frozen, keyword-only, unknown keys forbidden.

    Limits and descriptions are given per field as ``Annotated[int, msgspec.Meta(ge=1)]``;
    a rule across fields is a ``ValueError`` raised in ``__post_init__``.
    """


S = TypeVar("S", bound=Section)


def load(path: Path, kind: type[S]) -> S:
    """Read the TOML file at ``path`` as ``kind``.

    Raises:
        ConfigError: The file is missing, is not TOML, or breaks one or more rules of ``kind``.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(str(path), [f"cannot be read: {reason}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"is not valid TOML: {error}"]) from error
    return parse(raw, kind, source=str(path))


def parse(raw: Mapping[str, Any], kind: type[S], *, source: str) -> S:
    """Turn plain tables into ``kind``, collecting every problem before raising.

    Raises:
        ConfigError: One or more problems, each with the key's path and a suggestion.
    """
    problems: list[str] = []
    section = _section(raw, kind, "", problems)
    if problems or section is None:
        raise ConfigError(source, problems)
    return section


def _section(raw: Any, kind: type[S], path: str, problems: list[str]) -> S | None:
    if not isinstance(raw, Mapping):
        problems.append(
            f"{path.rstrip('.') or 'the whole'}: expected a table, got {type(raw).__name__}"
        )
        return None
    hints = get_type_hints(kind, include_extras=True)
    known = {field.name: field for field in msgspec.structs.fields(kind)}
    before = len(problems)
    unknown = [key for key in raw if key not in known]
    problems.extend(f"{path}{key}: unknown key{_suggestion(key, list(known))}" for key in unknown)
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name in raw:
            values[name] = _value(raw[name], hints[name], f"{path}{name}", problems)
        elif field.required:
            problems.append(f"{path}{name}: missing; expected {_describe(hints[name])}")
    if len(problems) > before:
        return None
    try:
        return kind(**values)
    except ValueError as error:
        problems.append(f"{path.rstrip('.') or 'the whole'}: {error}")
        return None


def _value(raw: Any, hint: Any, path: str, problems: list[str]) -> Any:
    section = _section_type(hint)
    if section is not None:
        return _section(raw, section, f"{path}.", problems)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is dict and isinstance(raw, Mapping) and (kind := _section_type(arguments[1])):
        return {key: _section(item, kind, f"{path}.{key}.", problems) for key, item in raw.items()}
    if origin in {list, tuple} and isinstance(raw, list) and (kind := _section_type(arguments[0])):
        items = [_section(item, kind, f"{path}[{i}].", problems) for i, item in enumerate(raw)]
        return items if origin is list else tuple(items)
    try:
        return msgspec.convert(raw, hint)
    except msgspec.ValidationError as error:
        problems.append(f"{path}: {_plain(str(error))}{_choices(raw, hint)}")
        return None


def _section_type(hint: Any) -> type[Section] | None:
    """The Section behind ``Section``, ``Section | None`` or ``Annotated[Section, ...]``."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in {Union, types.UnionType}:
        inner = [item for item in get_args(hint) if item is not type(None)]
        hint = inner[0] if len(inner) == 1 else hint
    if isinstance(hint, type) and issubclass(hint, Section):
        return hint
    return None


def _suggestion(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def _choices(raw: Any, hint: Any) -> str:
    """For a wrong literal: the choices and the nearest one."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    choices = [str(item) for item in get_args(hint) if isinstance(item, str)]
    return _suggestion(raw, choices) if isinstance(raw, str) and choices else f", got {raw!r}"


def _plain(text: str) -> str:
    return text[:1].lower() + text[1:]


def _describe(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return getattr(hint, "__name__", str(hint))
