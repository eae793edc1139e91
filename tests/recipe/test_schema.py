import json
from typing import Any

from llmtrain.recipe.recipe import Recipe
from llmtrain.recipe.schema import json_schema

SCHEMA = json_schema()


def resolve(node: dict[str, Any]) -> dict[str, Any]:
    return SCHEMA["$defs"][node["$ref"].removeprefix("#/$defs/")] if "$ref" in node else node


def kinds(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The alternatives of a node, references followed."""
    return [resolve(kind) for kind in node.get("anyOf", node.get("oneOf", [node]))]


def test_it_is_json_and_has_every_key_with_its_documentation() -> None:
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    assert set(SCHEMA["properties"]) == set(Recipe.model_fields)
    assert SCHEMA["additionalProperties"] is False
    assert all("description" in node for node in SCHEMA["properties"].values())


def test_references_lead_somewhere() -> None:
    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                assert node["$ref"].removeprefix("#/$defs/") in SCHEMA["$defs"]
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(SCHEMA)


def test_any_value_may_be_an_interpolation() -> None:
    for name in ("seed", "max_seq_len", "max_duration"):
        assert any("${" in str(kind.get("pattern")).replace("\\", "") for kind in kinds(SCHEMA["properties"][name]))


def test_an_optimizer_is_chosen_by_name() -> None:
    union = next(kind for kind in kinds(SCHEMA["properties"]["optimizer"]) if "oneOf" in kind)
    names = {kind["properties"]["name"]["const"] for kind in kinds(union)}
    assert names == {"adamw", "decoupled_adamw", "decoupled_lionw"}


def test_an_eval_loader_may_stand_alone_or_in_a_list() -> None:
    alternatives = [kind for node in kinds(SCHEMA["properties"]["eval_loader"]) for kind in kinds(node)]
    assert any(kind.get("type") == "array" for kind in alternatives)
    assert any("dataset" in kind.get("properties", {}) for kind in alternatives)


def test_what_loading_fills_in_is_not_required() -> None:
    assert "max_seq_len" in SCHEMA["required"]
    for name, node in SCHEMA["$defs"].items():
        if name.endswith("DatasetConfig"):
            assert "max_seq_len" not in node.get("required", [])
