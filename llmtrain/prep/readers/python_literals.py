"""Python files that assign dicts of strings."""

import ast
from collections.abc import Iterator

from llmtrain.prep.plan import InputFile
from llmtrain.prep.readers.bad_input import BadInput
from llmtrain.prep.readers.files import noting_damage
from llmtrain.prep.readers.row import Row, good_row
from llmtrain.prep.readers.text import NotUtf8, text_chunks


def python_literals_rows(file: InputFile, bad: BadInput) -> Iterator[Row]:
    """`name = {key: "text", ...}`: how Python keeps its language reference (`pydoc_data/topics.py`)."""
    texts: list[str] = []
    with noting_damage(file.path, bad):
        try:
            module = ast.parse("".join(text_chunks(file)))
            values = [ast.literal_eval(node.value) for node in module.body if isinstance(node, ast.Assign)]
        except NotUtf8 as problem:
            bad(*problem.args)
            return
        except (SyntaxError, ValueError, RecursionError) as problem:
            bad(file.path, f"expected assignments of literals only: {problem}")
            return
        dicts = (value for value in values if isinstance(value, dict))
        texts = [text for value in dicts for text in value.values() if isinstance(text, str)]
        if not texts:
            bad(file.path, "assigns no dict of strings (format: python_literals)")
    for number, text in enumerate(texts):
        place = f"{file.path}, text {number}"
        row = good_row(number, text, place, bad)
        if row is not None:
            yield row
