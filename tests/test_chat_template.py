"""What the named templates render, and how templates are found."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.chat_template import template_text
from llmtrain.errors import UserError
from llmtrain.tokenizer import TokenizerConfig, load_tokenizer

QUESTION = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}
DOLLY = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@pytest.fixture(scope="module")
def render(corpus):
    def render(turns, template, generation_prompt=False, **keys):
        cfg = TokenizerConfig(name=str(corpus.tokenizer), chat_template=template, **keys)
        return load_tokenizer(cfg).apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt)

    return render


def test_chatml(render):
    text = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>\n"
    assert render([QUESTION, ANSWER], "chatml") == text
    assert render([QUESTION], "chatml", True) == text.split("Because.")[0]
    assert render([SYSTEM, QUESTION, ANSWER], "chatml") == "<|im_start|>system\nBe brief.<|im_end|>\n" + text
    with_prompt = render([QUESTION, ANSWER], "chatml", system_prompt="Be kind.")
    assert with_prompt == "<|im_start|>system\nBe kind.<|im_end|>\n" + text
    assert "Be kind." not in render([SYSTEM, QUESTION, ANSWER], "chatml", system_prompt="Be kind.")


def test_dolly_is_the_format_of_mpt_instruct(render):
    text = DOLLY + "\n### Instruction:\nWhy?\n### Response:\nBecause.<|endoftext|>"
    assert render([QUESTION, ANSWER], "dolly") == text
    assert render([QUESTION], "dolly", True) == text.split("Because.")[0]
    again = "\n### Instruction:\nWhy?\n### Response:\nBecause.<|endoftext|>"
    assert render([QUESTION, ANSWER, QUESTION, ANSWER], "dolly") == text + again
    assert render([SYSTEM, QUESTION, ANSWER], "dolly") == text.replace(DOLLY, "Be brief.")
    assert render([QUESTION, ANSWER], "dolly", system_prompt="Be kind.") == text.replace(DOLLY, "Be kind.")


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(min_size=1) | st.sampled_from(["{{ x }} {% raw %}", "'\"\\ -%} \\n", "🙂\r\n\u2028", "{# no #}"]))
def test_a_system_prompt_is_rendered_as_it_is(prompt):
    from jinja2 import Environment

    text = template_text("chatml", prompt)
    shown = Environment(trim_blocks=True, lstrip_blocks=True).from_string(text).render(messages=[QUESTION])
    assert shown.startswith(f"<|im_start|>system\n{prompt}<|im_end|>\n<|im_start|>user")


def test_a_template_from_a_file_and_as_text(render, tmp_path):
    text = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
    (tmp_path / "t.jinja").write_text(text)
    assert render([QUESTION, ANSWER], str(tmp_path / "t.jinja")) == "user: Why?;assistant: Because.;"
    assert render([QUESTION, ANSWER], text) == "user: Why?;assistant: Because.;"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("chatlm", "named template"),
        ("/nowhere/t.jinja", "cannot be read"),
        ("{% for m in messages %}", "not a Jinja template: line 1"),
    ],
)
def test_what_is_no_template(render, template, message):
    with pytest.raises(UserError, match=message):
        render([QUESTION], template)


def test_a_system_prompt_needs_a_named_template():
    with pytest.raises(ValueError, match="named template"):
        TokenizerConfig(name="x", system_prompt="Be kind.")
    with pytest.raises(ValueError, match="named template"):
        TokenizerConfig(name="x", system_prompt="Be kind.", chat_template="{{ messages }}")
    with pytest.raises(UserError, match="written into a named template"):
        template_text("{{ messages }}", "Be kind.")
