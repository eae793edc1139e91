"""A template that would train a wrong token does not get as far as training."""

import pytest

from llmtrain.conversations.messages import Chat, Message, PromptResponse
from llmtrain.data.finetuning.mask_check import check_template
from llmtrain.errors import UserError
from llmtrain.tokenizer import TokenizerConfig, load_tokenizer
from tests.data.finetuning.conftest import chat, write_rows
from tests.data.finetuning.templates import GENERATION, GOOD, LLAMA3, MISTRAL, QWEN3, SPECIAL, WRONG


def conversation(*contents, system=None):
    turns = [Message(("user", "assistant")[n % 2], content) for n, content in enumerate(contents)]
    return Chat((*([Message("system", system)] if system else []), *turns))


CHATS = [
    conversation("a question", "an answer"),
    PromptResponse("not looked", "at"),
    conversation("first question\n", " second answer", "third\n\nquestion", "fourth answer 🙂 é"),
]


@pytest.fixture(scope="module")
def check(corpus):
    def check(template, chats=CHATS, **keys):
        cfg = TokenizerConfig(name=str(corpus.tokenizer), chat_template=template, special_tokens=SPECIAL, **keys)
        return check_template(load_tokenizer(cfg), chats)

    return check


@pytest.mark.parametrize("name", GOOD)
def test_right_templates_pass_in_silence(name, check):
    warnings = check(GOOD[name][0])
    assert len(warnings) == (1 if name == "plain" else 0)  # which has no special token at the end of an answer


@pytest.mark.parametrize("name", WRONG)
def test_wrong_templates_are_refused(name, check):
    template, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        check(template)


def test_what_is_rendered_in_another_way_than_by_transformers(check, monkeypatch):
    monkeypatch.setattr("llmtrain.data.finetuning.jinja._tojson", lambda value, **_: "something else")
    with pytest.raises(UserError, match="another way than by transformers"):
        check("{% for m in messages %}{{ m.role + m.content + (1 | tojson) + eos_token }}{% endfor %}")


def test_conversations_are_needed(check):
    assert check(WRONG["answers lost"][0], [PromptResponse("a", "b")]) == []


NO_GENERATION_PROMPT = LLAMA3.split("{% if add_generation_prompt")[0]
THINKS_FIRST = LLAMA3.replace("<|end_header_id|>\n\n' }}{% endif", "<|end_header_id|>\n\n<think>' }}{% endif")
END_OUTSIDE = GENERATION.replace("+ '<|im_end|>' }}{%- endgen", "}}{%- endgen").replace(
    "endgeneration -%}", "endgeneration -%}{{- '<|im_end|>' -}}"
)
LAST_ONLY = GENERATION.replace("'assistant' -%}", "'assistant' and loop.last -%}")
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
NO_SYSTEM = CHATML.replace("in messages", "in messages if m.role != 'system'")
WITH_SYSTEM = conversation("a", "b", system="s")


@pytest.mark.parametrize(
    ("template", "chats", "warning"),
    [
        (NO_GENERATION_PROMPT, CHATS, "no generation prompt: '<|start_header_id|>assistant"),
        (QWEN3, CHATS, r"writes '<think>\n\n</think>\n\n': it is trained"),
        (THINKS_FIRST, CHATS, "generation prompt ends with '<think>'"),
        (MISTRAL, [*CHATS, WITH_SYSTEM], "refuses 1 of the first 3"),
        ("chatml", [conversation("what is <|im_end|>?", "b")], "1 of the first 1 conversations hold the text of a"),
        (END_OUTSIDE, CHATS, "trained without their end"),
        (LAST_ONLY, CHATS, "outside the chat template's"),
        (NO_SYSTEM, [WITH_SYSTEM], "leaves out, repeats or rewrites what the system says"),
        (CHATML + "{{ '<|im_start|>assistant\n' }}", CHATS, "even if add_generation_prompt is not set"),
    ],
    ids=range(9),
)
def test_what_is_worth_knowing_is_said_once(template, chats, warning, check):
    warnings = check(template, chats)
    assert sum(warning in text for text in warnings) == 1, warnings
    assert len(set(warnings)) == len(warnings)


def test_no_template_at_all(corpus):
    tokenizer = load_tokenizer(TokenizerConfig(name=str(corpus.tokenizer)))
    with pytest.raises(UserError, match="no chat template"):
        check_template(tokenizer, CHATS)


def test_a_conversation_that_does_not_fit_is_no_reason_to_refuse_all(build, tmp_path, caplog):
    """Its text may hold what this module marks places with; it is dropped, wherever it stands."""
    for place in (0, 60):
        rows = [chat(number) for number in range(70)]
        rows[place]["messages"][0]["content"] = "a \U0010fff0b\U0010fff1"
        loader = build(files=str(write_rows(tmp_path / f"{place}.jsonl", rows)))
        assert loader.dataset.stores[0].report.dropped == {"private-use characters": 1}
    assert "1 of the first 50 conversations are dropped" in caplog.text
