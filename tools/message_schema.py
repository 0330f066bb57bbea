"""The JSON schema of a message, in the form that Foxglove reads.

It takes schemas in one piece, whose fields each have one type and whose arrays have items of one type; a schema with
anything else makes its whole channel unreadable there.
"""

from __future__ import annotations

from typing import Any

import msgspec


def object_schema(kind: Any) -> dict[str, Any]:
    """Make the schema of a message. Raises TypeError for a message that cannot be said in that form."""
    (whole,), parts = msgspec.json.schema_components([kind], ref_template="{name}")
    return _plain(whole, parts)


def _plain(schema: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        return _plain(parts[schema["$ref"]], parts)
    said = {name: schema[name] for name in ("title", "description", "enum") if name in schema}
    match schema:
        case {"enum": [str(), *_]}:
            return {"type": "string", **said}
        case {"type": "object"}:
            # A map of names to values has no fields of its own, and is shown all the same.
            fields = {name: _plain(field, parts) for name, field in schema.get("properties", {}).items()}
            required = {"required": schema["required"]} if schema.get("required") else {}
            return {"type": "object", **said, "properties": fields, **required}
        case {"type": "array"}:
            item = schema["prefixItems"][0] if "prefixItems" in schema else schema["items"]
            return {"type": "array", **said, "items": _plain(item, parts)}
        case {"type": "boolean" | "string" | "number" | "integer" as name}:
            return {"type": name, **said}
    raise TypeError(f"no schema for Foxglove can be made of {schema}")
