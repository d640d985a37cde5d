"""JSON Schema of configs for editors: the sections, and each part's options as its constructor has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cosmos_ssl import registry
from cosmos_ssl.config import NAMED_GROUPS, SINGLE_PARTS, Config
from cosmos_ssl.errors import PluginError


def config_schema() -> tuple[dict[str, Any], list[str]]:
    """The schema, and one message for each part that cannot be imported (its options are left open).

    A config may be partial where it extends another, so nothing is required, and any key may be null.
    """
    schema = Config.model_json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    broken: list[str] = []
    for group in registry.GROUPS:
        definitions[f"part_{group}"] = _group_schema(group, broken, definitions)
    for path, group in SINGLE_PARTS.items():
        holder, key = _holder(schema, path)
        holder["properties"][key] = {"$ref": f"#/$defs/part_{group}"}
    for path, group in NAMED_GROUPS.items():
        holder, key = _holder(schema, path)
        holder["properties"][key] = {
            "type": "object",
            "additionalProperties": _or_null({"$ref": f"#/$defs/part_{group}"}),
        }
    name_or_names = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    schema["properties"]["extends"] = {**name_or_names, "description": "The config, or configs, that this one changes"}
    for holder in (schema, *definitions.values()):
        holder.pop("required", None)
        if "properties" in holder:
            holder["properties"] = {key: _or_null(value) for key, value in holder["properties"].items()}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema, broken


def _holder(schema: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """The section that a key path leads into, and the last key."""
    *section, key = path.split(".")
    if not section:
        return schema, key
    return schema["$defs"][Config.model_fields[section[0]].annotation.__name__], key  # type: ignore[union-attr]


def _or_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [dict(schema), {"type": "null"}]}


def _group_schema(group: str, broken: list[str], definitions: dict[str, Any]) -> dict[str, Any]:
    """Any part of one group; its ``type``, where given, decides which options there are."""
    records = [record for record in registry.records() if record.group == group]
    rules = []
    for record in records:
        try:
            options = _part_schema(record, definitions)
        except PluginError as error:
            broken.append(str(error))
            continue
        names = sorted({registry.spelling(record), record.qualified})
        rules.append({"if": {"properties": {"type": {"enum": names}}, "required": ["type"]}, "then": options})
    spellings = sorted({registry.spelling(record) for record in records})
    name = {"anyOf": [{"enum": spellings}, {"type": "string", "pattern": "^[^:]+:[^:]+$"}]}
    return {"type": "object", "properties": {"type": name}, "allOf": rules}


def _part_schema(record: registry.Record, definitions: dict[str, Any]) -> dict[str, Any]:
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticUserError

    section = definitions.get(
        {"optimizers": "OptimizerConfig", "schedules": "ScheduleConfig"}.get(record.group, ""), {}
    )
    engines = section.get("properties", {})
    properties: dict[str, Any] = {key: engines.get(key, {}) for key in registry.GROUPS[record.group].reserved}
    cls = registry.load(record)
    for option in registry.options_of(cls):
        try:
            schema = TypeAdapter(option.type).json_schema(ref_template="#/$defs/{model}")
        except PydanticUserError:
            schema = {}
        definitions.update(schema.pop("$defs", {}))
        properties[option.name] = _or_null({**schema, **({"description": option.doc} if option.doc else {})})
    return {
        "properties": properties,
        "additionalProperties": False,
        "description": " ".join((cls.__doc__ or "").strip().partition("\n\n")[0].split()),
    }
