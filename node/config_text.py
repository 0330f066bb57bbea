"""A node.toml with every setting, its default and what it does, made from `NodeConfig` itself."""

import json
from typing import Any

from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo

from .config import NodeConfig, Stream, StreamDefaults

MAX_ALIGNED = 36

HEADER = """\
# Every setting of a node, with its default. A setting with no default is commented out.
# The environment wins over this file (ONLOOKER_QUESTIONS__MAX_WAITING=8), and flags win over both
# (--set questions.max_waiting=8). Relative paths start at the working directory.
"""
STREAMS = """
# Streams to start with. Without `connect`, the camera connects to the frames endpoint and publishes under
# this name. Anything of [stream_defaults] may be set here.
#
# [[streams]]
"""


def config_text() -> str:
    """Return the text of the file. What it says is the default configuration."""
    plain = {name: field for name, field in NodeConfig.model_fields.items() if _section(field) is None}
    del plain["streams"]
    text = HEADER + "\n" + _settings(plain)
    for name, field in NodeConfig.model_fields.items():
        section = _section(field)
        if section is not None:
            text += f"\n[{name}]  # {_first_words(section)}\n" + _settings(section.model_fields)
    own = {name: field for name, field in Stream.model_fields.items() if name not in StreamDefaults.model_fields}
    return text + STREAMS + _settings(own)


def _settings(fields: dict[str, FieldInfo]) -> str:
    """A line for each setting, with the comments below each other as far as that leaves them readable."""
    settings = [(_setting(name, field), field.description) for name, field in fields.items()]
    width = max(len(setting) for setting, _ in settings if len(setting) <= MAX_ALIGNED)
    return "".join(f"{setting:<{width}}  # {description}\n" for setting, description in settings)


def _setting(name: str, field: FieldInfo) -> str:
    if field.is_required() or field.default is None or field.default_factory is not None:
        assert field.examples, f"{name} has no default and no example"
        return f"# {name} = {_value(field.examples[0])}"
    return f"{name} = {_value(field.default)}"


def _value(value: Any) -> str:
    """A value as TOML, which writes all that we have as JSON does."""
    return json.dumps(_size(value) if isinstance(value, ByteSize) else value)


def _size(num_bytes: ByteSize) -> str:
    unit = next(unit for unit in ("GiB", "MiB", "KiB", "B") if num_bytes.to(unit).is_integer())
    return f"{num_bytes.to(unit):.0f}{unit}"


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _first_words(section: type[BaseModel]) -> str:
    text = (section.__doc__ or "").strip().removesuffix(".")
    return text[:1].lower() + text[1:]
