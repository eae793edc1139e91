"""The JSON Schema of recipes, with which editors complete and check them while one types."""

from typing import Any

from llmtrain.recipe.recipe import Recipe

_INTERPOLATION = {"type": "string", "pattern": r"\$\{.*\}"}


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a training recipe; any value may also be an interpolation (`${max_seq_len}`)."""
    schema: dict[str, Any] = Recipe.model_json_schema(mode="validation")
    properties: dict[str, Any] = schema["properties"]
    # What loading fills in is not required in the file.
    for name, definition in schema.get("$defs", {}).items():
        if name.endswith("DatasetConfig") and "max_seq_len" in definition.get("required", []):
            definition["required"].remove("max_seq_len")
    # Python sees a list; a file may have a single loader.
    loader = properties["eval_loader"]
    properties["eval_loader"] = {
        **{key: value for key, value in loader.items() if key not in ("type", "items", "default")},
        "anyOf": [loader["items"], {"type": "array", "items": loader["items"]}, {"type": "null"}],
    }
    interpolated = {key: _or_interpolation(value) for key, value in properties.items()}
    definitions = {
        name: {
            **definition,
            "properties": {key: _or_interpolation(value) for key, value in definition["properties"].items()},
        }
        if "properties" in definition
        else definition
        for name, definition in schema.get("$defs", {}).items()
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "llmtrain training recipe",
        "properties": interpolated,
        "$defs": definitions,
    }


def _or_interpolation(schema: dict[str, Any]) -> dict[str, Any]:
    about: dict[str, Any] = {key: schema[key] for key in ("description", "default", "title") if key in schema}
    rest = {key: value for key, value in schema.items() if key not in about}
    if "const" in rest:  # the name that chooses between components: never interpolated
        return schema
    return {**about, "anyOf": [*(rest["anyOf"] if set(rest) == {"anyOf"} else [rest]), _INTERPOLATION]}
