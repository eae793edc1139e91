"""Which keys a schema knows at a place, and in which places it knows a key."""

from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from llmtrain.config.positions import Path


def branches(annotation: Any) -> Iterator[Any]:
    """The members of a union (or the one type), without Annotated and None."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from branches(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from branches(member)
    elif annotation is not NoneType and annotation is not None:
        yield annotation


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The config classes among the members of a union."""
    for member in branches(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            yield member


def fields_of(model: type[BaseModel]) -> dict[str, Any]:
    """Key as it stands in YAML -> its FieldInfo."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def name_of(model: type[BaseModel]) -> tuple[str, ...]:
    """The values of a config's `name: Literal[...]`, which tells the members of a union apart; else nothing."""
    info = model.model_fields.get("name")
    return get_args(info.annotation) if info is not None and get_origin(info.annotation) is Literal else ()


def models_at(schema: type[BaseModel], path: Path, data: Any) -> list[type[BaseModel]]:
    """The config classes that may stand at `path` of `data`; several only where a union is undecided."""
    annotations: list[Any] = [schema]
    for key in path:
        annotations = [child for annotation in annotations for child in _children(annotation, key, data)]
        data = descend(data, key)
    if isinstance(data, Mapping):  # a single block where a list may stand
        annotations += [item for annotation in annotations for item in _items(annotation)]
    return _decided([model for annotation in annotations for model in models_in(annotation)], data)


def _items(annotation: Any) -> Iterator[Any]:
    """The type of the items, where a list may stand."""
    for member in branches(annotation):
        origin = get_origin(member)
        if isinstance(origin, type) and issubclass(origin, Sequence) and get_args(member):
            yield get_args(member)[0]


def _children(annotation: Any, key: str, data: Any) -> Iterator[Any]:
    for model in _decided(list(models_in(annotation)), data):
        if key in fields_of(model):
            yield fields_of(model)[key].annotation
    for member in branches(annotation):
        origin = get_origin(member)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            yield get_args(member)[1]
    for item in _items(annotation):
        if key.isdigit():
            yield item
        elif isinstance(data, Mapping):
            yield from _children(item, key, data)


def _decided(models: list[type[BaseModel]], data: Any) -> list[type[BaseModel]]:
    """The members of a union that `name` points to; all of them when it points to none."""
    name = data.get("name") if isinstance(data, Mapping) else None
    return [model for model in models if name in name_of(model)] or models


def descend(data: Any, key: str) -> Any:
    """The value of one key or list position; None when there is none."""
    if isinstance(data, Mapping):
        return data.get(key)
    if isinstance(data, (list, tuple)) and key.isdigit() and int(key) < len(data):
        return data[int(key)]
    return None


def places_of(schema: type[BaseModel], key: str) -> list[Path]:
    """Every path under which the schema knows a key of this name, shortest first."""
    found: dict[Path, None] = {}

    def visit(annotation: Any, path: Path, above: tuple[type[BaseModel], ...]) -> None:
        for model in models_in(annotation):
            if model in above:
                continue
            for name, info in fields_of(model).items():
                if name == key:
                    found[(*path, name)] = None
                visit(info.annotation, (*path, name), (*above, model))
        for item in _items(annotation):
            visit(item, path, above)

    visit(schema, (), ())
    return sorted(found, key=lambda place: (len(place), place))
