"""Rows of the sources of a conversation recipe, as examples."""

from collections.abc import Iterator
from dataclasses import dataclass

from llmtrain.conversations import preprocessing
from llmtrain.conversations.formats import parse
from llmtrain.conversations.messages import BadExample, Chat, Example, PromptResponse
from llmtrain.conversations.rows import file_rows, hf_rows
from llmtrain.errors import UserError
from llmtrain.prep.conversation_config import ConversationSource
from llmtrain.prep.inputs import files_of, named_files_of
from llmtrain.prep.python_docs import docstring_pairs, doctest_sessions, module_name


@dataclass(frozen=True, slots=True)
class Read:
    """A row that was read."""

    place: str
    """File and line or row."""
    key: str
    """What decides on the split: rows with one key stay together."""
    example: Chat | PromptResponse | BadExample
    """The example, or what is wrong with it."""


def read(source: ConversationSource) -> Iterator[Read]:
    """The rows of a source, good ones and bad ones, in an order that is always the same.

    Raises:
        UserError: a file, dataset or function is not there or cannot be read; or rows are tokenised already.
    """
    if source.format != "auto":
        yield from _python(source)
        return
    if source.files is not None:
        rows = file_rows(files_of(source))
    else:
        assert source.hf_name is not None
        rows = hf_rows(source.hf_name, source.split, source.hf_kwargs, source.safe_load)
    preprocess = preprocessing.resolve(source.preprocessing_fn, default_for=source.hf_name)
    for row in rows:
        if row.data is None:
            yield Read(row.place, "", row.problem or BadExample("unreadable row"))
            continue
        try:
            example = parse(preprocess(row.data))
        except BadExample as problem:
            yield Read(row.place, "", problem)
            continue
        if not isinstance(example, Chat | PromptResponse):
            raise UserError(
                f"source {source.name!r}: {row.place} holds token ids: nothing to prepare. "
                "The finetuning loader reads such shards as they are"
            )
        yield Read(row.place, question(example), example)


def question(example: Example) -> str:
    """The text that an example begins with, its system turn left out: what is asked."""
    if isinstance(example, PromptResponse):
        return example.prompt
    assert isinstance(example, Chat)
    return next(message.content for message in example.messages if message.role != "system")


def _python(source: ConversationSource) -> Iterator[Read]:
    conversations = docstring_pairs if source.format == "python_docstrings" else doctest_sessions
    for path, name_in_source in named_files_of(source).items():
        for name, line, chat in conversations(path, module_name(name_in_source)):
            yield Read(f"{path}, line {line}", name, chat)
