import json
import pickle

import numpy as np
import pytest

from llmtrain.conversations.formats import parse
from llmtrain.conversations.messages import BadExample, Chat, Message, PromptResponse, Tokenized

ASK, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
CHAT = Chat((Message("user", "Why?"), Message("assistant", "Because.")))


def turns(*pairs, key="messages"):
    names = ("from", "value") if key == "conversations" else ("role", "content")
    return {key: [dict(zip(names, pair, strict=True)) for pair in pairs]}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, ANSWER]},
        {"messages": (ASK, ANSWER), "source": "x", "prompt": None},
        {"messages": np.array([ASK, ANSWER])},
        {"messages": json.dumps([ASK, ANSWER])},
        {"messages": json.dumps([ASK, ANSWER]).encode()},
        {"messages": [{"role": "user", "content": b"Why?"}, {**ANSWER, "name": None}], "prompt": "Why?"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Wh"}, {"text": "y?"}]}, ANSWER]},
        turns(("human", "Why?"), ("gpt", "Because."), key="conversations"),
        turns(("User", "Why?"), ("chatgpt", "Because."), key="conversations"),
        turns(("human", "Why?"), ("bing", "Because."), key="conversations"),
        turns(("human", "Why?"), ("bard", "Because."), key="conversations"),
        {"conversations": [ASK, ANSWER], "messages": None},
    ],
)
def test_every_spelling_of_a_chat(row):
    assert parse(row) == CHAT


def test_all_roles():
    made = parse(turns(("system", "S"), ("user", "U"), ("assistant", "A"), ("tool", "T"), ("assistant", " B \n")))
    assert [message.role for message in made.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert made.messages[-1].content == " B \n"


@pytest.mark.parametrize("key", ["response", "completion"])
def test_prompt_and_response(key):
    row = {"prompt": b"2+2=", key: "4", "id": 7}
    assert parse(row) == PromptResponse("2+2=", "4")


def test_token_ids_as_llm_foundry_writes_them():
    written = [{"input_ids": [1, 2], "labels": [3]}, {"input_ids": np.array([4], np.uint16), "labels": (5, 6)}]
    made = parse({"turns": written})
    assert [[list(part) for part in turn] for turn in made.turns] == [[[1, 2], [3]], [[4], [5, 6]]]
    ids, labels = np.array([7, 8], np.int64), np.array([9], np.int64)
    for row in ({"input_ids": ids.tobytes(), "labels": labels.tobytes()}, {"input_ids": ids, "labels": labels}):
        made = parse(row)
        assert isinstance(made, Tokenized)
        assert [part.tolist() for part in made.turns[0]] == [[7, 8], [9]]
    narrow = {"input_ids": ids.astype(np.uint16).tobytes(), "labels": labels.astype(np.uint16).tobytes()}
    assert parse(narrow, token_encoding="uint16").turns[0][0].tolist() == [7, 8]


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({}, "missing keys", "the row has nothing"),
        ({"text": "x", "prompt": "y"}, "missing keys", "the row has prompt, text"),
        ({"prompt": "x", "response": None}, "missing keys", "the row has prompt"),
        ({"prompt": "x", "response": "y", "completion": "z"}, "ambiguous keys", "both"),
        ({"prompt": 3, "response": "y"}, "non-string content", "prompt is int 3"),
        ({"prompt": " \n", "response": "y"}, "empty turn", "the prompt is empty"),
        ({"prompt": "x", "response": ""}, "empty turn", "the response is empty"),
        ({"prompt": b"ok\xff", "response": "y"}, "invalid UTF-8", r"prompt: byte 2 \(0xff\)"),
        ({"prompt": "x\ud800", "response": "y"}, "invalid UTF-8", "surrogate"),
        ({"messages": []}, "no turns", "messages is empty"),
        ({"messages": "hello"}, "malformed turn", "not JSON"),
        ({"messages": {"role": "user"}}, "malformed turn", "not a list"),
        ({"messages": ["hi", ANSWER]}, "malformed turn", "turn 1 is str 'hi'"),
        ({"messages": [{"text": "hi"}, ANSWER]}, "malformed turn", "turn 1 has text; expected role and content"),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, "non-string content", r"turn 1 \(user\) is null"),
        (
            {"messages": [ASK, {"role": "assistant", "content": 4.5}]},
            "non-string content",
            r"turn 2 \(assistant\) is float",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "url": "x"}]}, ANSWER]},
            "non-string content",
            "a part that is no text",
        ),
        ({"messages": [{"role": 3, "content": "x"}, ANSWER]}, "unknown role", "int 3"),
        (turns(("human", "x"), ("assistant", "y")), "unknown role", "turn 1: 'human' is none of system, user"),
        (turns(("human", "x"), ("llama", "y"), key="conversations"), "unknown role", "'llama'"),
        (turns(("user", "x"), ("assistant", " \t")), "empty turn", r"turn 2 \(assistant\)"),
        (turns(("user", "x"), ("user", "y"), ("assistant", "z")), "duplicate role", "turn 2"),
        (turns(("user", "x"), ("assistant", "y"), ("assistant", "z")), "duplicate role", "turn 3"),
        (turns(("user", "x"), ("system", "y"), ("assistant", "z")), "system turn not first", "turn 2"),
        (turns(("user", "x"), ("assistant", "y"), ("user", "z")), "wrong last role", "the user's"),
        (turns(("user", "x"), ("assistant", "y"), ("tool", "z")), "wrong last role", "the tool's"),
        (turns(("system", "x"), ("assistant", "y")), "no user turn", "system, assistant"),
        (turns(("user", "x")), "no assistant turn", "user"),
        ({"turns": []}, "no turns", ""),
        ({"turns": [{"input_ids": [1]}]}, "malformed turn", "input_ids and labels"),
        ({"turns": [{"input_ids": [1], "labels": []}]}, "empty turn", "turn 1: labels is empty"),
        ({"turns": [{"input_ids": [1.5], "labels": [1]}]}, "malformed token ids", r"list \[1.5\]"),
        ({"turns": [{"input_ids": [[1], [2, 3]], "labels": [1]}]}, "malformed token ids", ""),
        ({"turns": [{"input_ids": [1], "labels": [-100]}]}, "malformed token ids", ""),
        ({"input_ids": b"123", "labels": b"12345678"}, "malformed token ids", "input_ids"),
    ],
)
def test_malformed_rows_are_told_apart(row, reason, detail):
    with pytest.raises(BadExample, match=detail) as caught:
        parse(row)
    assert caught.value.reason == reason
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.reason, again.detail, str(again)) == (reason, caught.value.detail, str(caught.value))


def test_an_example_is_returned_unless_its_text_is_no_unicode():
    for example in (CHAT, PromptResponse("a", "ü"), Tokenized((([1], [2]),))):
        assert parse(example) is example
    for example in (PromptResponse("a", "\udfff"), Chat((Message("user", "\ud800"), Message("assistant", "x")))):
        with pytest.raises(BadExample, match="surrogate"):
            parse(example)
