"""Reading a configuration: YAML file, then ``key=value``, into :class:`~glider_dist.config.Config`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import re
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from glider_dist.config import Config
from glider_dist.errors import GliderError, first_line


@dataclasses.dataclass(frozen=True)
class Setting:
    """One configuration key: dotted name, type in words, default, meaning, allowed values."""

    key: str
    kind: str
    default: Any
    doc: str
    choices: tuple[str, ...]

    @property
    def is_text(self) -> bool:
        return self.kind in ("str", "str or None")


@functools.cache
def settings() -> tuple[Setting, ...]:
    """Every key of the configuration, in order."""
    return tuple(_settings_of(Config, ""))


def _settings_of(cls: type, prefix: str) -> Iterator[Setting]:
    hints = typing.get_type_hints(cls)
    default = cls()
    for item in dataclasses.fields(cls):
        key = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _settings_of(hints[item.name], f"{key}.")
        else:
            metadata = item.metadata
            yield Setting(
                key,
                _in_words(hints[item.name]),
                getattr(default, item.name),
                metadata["doc"],
                metadata["choices"],
            )


def _in_words(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join("None" if arg is type(None) else _in_words(arg) for arg in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"list of {_in_words(typing.get_args(hint)[0])}"
    return str(hint.__name__)


def read_config(file: Path | None, overrides: Sequence[str], defaults: dict[str, Any] | None = None) -> Config:
    """Defaults, then the YAML file, then ``key=value`` in order.

    Raises:
        GliderError: a missing or broken file, an unknown key (the nearest one is named), a wrong type or a value
            that is not among the choices, each with the place it came from.
    """
    config = OmegaConf.structured(Config)
    for key, value in (defaults or {}).items():
        OmegaConf.update(config, key, value)
    texts = {setting.key for setting in settings() if setting.is_text}
    if file is not None:
        config = _merge(config, [_read_yaml(file, texts)], str(file))
    typed = []
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign or not key:
            raise GliderError(f"{item!r} is not key=value")
        if key in texts and re.fullmatch(r"[-+.\d][-+.:\w]*", text):
            # YAML reads run_dir=2026_11 as a number, which would lose its underscore.
            item = f"{key}='{text}'"
        try:
            # The help prints None, which YAML would read as text.
            typed.append(OmegaConf.from_dotlist([f"{key}=null" if item == f"{key}=None" else item]))
        except Exception as error:
            raise GliderError(f"{item!r} cannot be read: {first_line(error)}") from None
    config = _merge(config, typed, "the command line")
    for setting in settings():
        try:
            value = OmegaConf.select(config, setting.key)
        except OmegaConfBaseException as error:
            raise GliderError(f"{setting.key} cannot be resolved: {first_line(error)}") from None
        if value == "False" and setting.is_text:
            # YAML reads a bare off as a boolean.
            value = "off"
            OmegaConf.update(config, setting.key, value)
        if setting.choices and value not in setting.choices:
            raise GliderError(f"{setting.key}={value!r}, but must be one of {', '.join(setting.choices)}")
    result = OmegaConf.to_object(config)
    assert isinstance(result, Config)
    result.validate()
    return result


class _AsWritten(yaml.SafeLoader):
    """Reads every scalar as the text that it is; merge keys stay merge keys."""

    yaml_implicit_resolvers: ClassVar = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}


def _read_yaml(file: Path, texts: Collection[str]) -> DictConfig:
    if not file.is_file():
        raise GliderError(f"the configuration file {file} does not exist")
    try:
        value = OmegaConf.load(file)
        written = yaml.load(file.read_text(encoding="utf-8"), _AsWritten)
    except Exception as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise GliderError(f"{file}{where} is not valid YAML: {problem}") from None
    if not isinstance(value, DictConfig):
        raise GliderError(f"{file} must hold keys and values")
    return OmegaConf.create(_keep_texts(OmegaConf.to_container(value), written, texts))


def _keep_texts(value: Any, written: Any, texts: Collection[str], key: str = "") -> Any:
    """``value`` with the text in the file for each number under a key of ``texts``."""
    if isinstance(value, dict) and isinstance(written, dict):
        below = f"{key}." if key else ""
        return {name: _keep_texts(value[name], written.get(name), texts, f"{below}{name}") for name in value}
    # YAML reads the time 12:00:00 as a number in base 60, and 2026_11 without its underscore.
    return written if key in texts and type(value) in (int, float) else value


def _merge(config: Any, values: Sequence[DictConfig], origin: str) -> Any:
    known = {setting.key: setting for setting in settings()}
    for name in itertools.chain(*values):
        group, dot, last = str(name).rpartition(".")
        if dot and name in known:
            raise GliderError(f"{origin}: {name} must be written as {last}, indented under {group}:")
    for key in itertools.chain(*(_leaves(value, known) for value in values)):
        inside = [other for other in known if other.startswith(key + ".")]
        if inside:
            raise GliderError(
                f"{origin}: {key} is a group of settings, such as {inside[0]}, and has no value itself"
            )
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise GliderError(f"{origin}: unknown key {key!r}; the nearest is {near[0]!r}")
    try:
        return OmegaConf.merge(config, *values)
    except OmegaConfBaseException as error:
        key = str(error.full_key or "")
        kind = f" ({known[key].kind} is expected)" if key in known else ""
        raise GliderError(f"{origin}: {key or 'a key'} has the wrong type{kind}: {first_line(error)}") from None


def _leaves(value: Any, known: dict[str, Setting], prefix: str = "") -> Iterator[str]:
    for name in value:
        key = f"{prefix}{name}"
        inner = value._get_node(name)
        groups = any(other.startswith(key + ".") for other in known)
        if isinstance(inner, DictConfig) and not inner._is_none() and key not in known and groups:
            yield from _leaves(inner, known, f"{key}.")
        else:
            yield key
