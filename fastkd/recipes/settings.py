"""A run as a dataclass: read from a YAML file, changed by `key=value` words, checked before any work."""

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any

import yaml

SHIPPED = Path(__file__).parent


def shipped_recipes() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def read_settings(name_or_path: str, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings of a shipped recipe (`arc-sst2`) or of one's own YAML file, with the overrides laid over them.

    Args:
        name_or_path: a name from `shipped_recipes()`, or the path of a YAML file.
        overrides: words `key=value`; `section.key=value` reaches into a section. Values are read as YAML.

    Raises:
        ValueError: no such recipe, no such file, a file that is no YAML or holds no mapping, or a word without `=`.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = SHIPPED / f"{name_or_path}.yaml"
    if not path.is_file():
        raise ValueError(
            f"no recipe {name_or_path!r}; shipped are {', '.join(shipped_recipes())}, or give the path of a YAML file"
        )
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no `key: value` settings")
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ValueError(f"{word!r} is not of the form key=value")
        *sections, last = key.split(".")
        place = settings
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ValueError(f"{word!r}: {section} is a value, not a section")
        place[last] = _scalar(value)
    return settings


def _scalar(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def check_keys(given: dict[str, Any], allowed: list[str] | tuple[str, ...], where: str) -> None:
    """Raise a ValueError that names the nearest allowed key for the first unknown one."""
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(sorted(allowed)[:40])}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")


class SectionError(ValueError):
    """Of a section of settings; the message begins with its name."""


def from_settings(cls: type, settings: dict[str, Any], where: str) -> Any:
    """Build the dataclass `cls`, checking keys first. A text value like 1e-4 becomes the number it is in YAML 1.2."""
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    check_keys(settings, tuple(fields), where)
    missing = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and settings.get(name) is None
    ]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} must be given, e.g. {missing[0]}=...")
    numbers = {
        k: _scalar(v) if isinstance(v, str) and fields[k].type in (float, "float") else v for k, v in settings.items()
    }
    for key, value in numbers.items():
        _check_kind(f"{where}: {key}", value, fields[key].type)
    return cls(**numbers)


def section_from(cls: type, settings: dict[str, Any], name: str) -> Any:
    """As `from_settings`, of a section within others: where the dataclass itself refuses them, too, the message begins
    with the section's name, and with the names of those that it is in."""
    try:
        return from_settings(cls, settings, name)
    except SectionError as error:
        raise SectionError(f"{name}.{error}") from error
    except ValueError as error:
        raise SectionError(f"{name}: {str(error).removeprefix(f'{name}: ')}") from error


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def _check_kind(what: str, value: Any, annotation: Any) -> None:
    """Raise a ValueError where a field of plain kinds (int, float, bool, str, None, unions of them) has another one."""
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    kinds = typing.get_args(annotation) if union else (annotation,)
    if not set(kinds) <= set(_KINDS) or value is None:
        return
    fits = any(
        isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
        for kind in kinds
    )
    if not fits:
        raise ValueError(f"{what}={value!r}; {' or '.join(_KINDS[kind] for kind in kinds)} is needed")
