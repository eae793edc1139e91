import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.errors import UserError
from llmtrain.generation.conversation import Conversation, TextStream, decode, encode, render
from llmtrain.stop_tokens import stop_ids
from llmtrain.tokenizer import TokenizerConfig, load_tokenizer

TRIMS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETS = (
    "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}[{{ m['role'] }}]{{ m['content'] }}{% endif %}"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def opened(tokenizer_folder):
    return load_tokenizer(TokenizerConfig(name=tokenizer_folder, chat_template="chatml"))


@pytest.fixture(scope="module")
def tokenizer_folder(tokenizer: Path) -> str:
    return str(tokenizer)


def with_template(folder: str, template: str):
    return load_tokenizer(TokenizerConfig(name=folder, chat_template=template))


class TestStream:
    @settings(max_examples=60, deadline=None)
    @given(text=st.text(max_size=30))
    def test_pieces_are_whole_characters_and_add_up(self, opened, text: str) -> None:
        ids = encode(opened, text)
        stream = TextStream(opened)
        pieces = [stream.push(token) for token in ids] + [stream.flush()]
        assert "".join(pieces) == decode(opened, ids)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)

    @settings(max_examples=60, deadline=None)
    @given(ids=st.lists(st.integers(0, 385), max_size=30))
    def test_whatever_a_model_writes(self, opened, ids: list[int]) -> None:
        stream = TextStream(opened)
        assert "".join([stream.push(token) for token in ids] + [stream.flush()]) == decode(opened, ids)

    def test_a_character_of_several_tokens_appears_at_once(self, opened) -> None:
        ids = encode(opened, "🦊")
        assert len(ids) > 1
        stream = TextStream(opened)
        assert [stream.push(token) for token in ids] == [*[""] * (len(ids) - 1), "🦊"]


class TestStopTokens:
    def test_end_of_text_and_end_of_turn(self, opened, tokenizer_folder: str) -> None:
        assert stop_ids(opened) == (opened.eos_token_id, opened.convert_tokens_to_ids("<|im_end|>"))
        plain = load_tokenizer(TokenizerConfig(name=tokenizer_folder))
        assert stop_ids(plain) == (plain.eos_token_id,)
        assert stop_ids(with_template(tokenizer_folder, "dolly")) == (plain.eos_token_id,)

    @pytest.mark.parametrize(
        "template", ["{% for m in messages %}{{ m.content }}###{% endfor %}", "{{ raise_exception('never') }}", FORGETS]
    )
    def test_templates_that_close_no_turn_with_a_token(self, tokenizer_folder: str, template: str) -> None:
        plain = with_template(tokenizer_folder, template)
        assert stop_ids(plain) == (plain.eos_token_id,)


class TestConversation:
    def test_a_turn_appends_to_the_ids_before_it(self, opened) -> None:
        talk, stops = Conversation(opened, system="Be brief."), stop_ids(opened)
        first = talk.ask("Where is the fox?")
        assert opened.decode(first) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhere is the fox?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        # Not what the tokenizer makes of the text: the model's own tokens stay.
        said = [token for letter in "In its den." for token in encode(opened, letter)]
        assert talk.answer([*said, stops[-1]], stops) == "In its den."
        second = talk.ask("Why?")
        assert second[: len(first) + len(said)] == first + said
        assert opened.decode(second) == render(opened, [*talk.messages, {"role": "user", "content": "Why?"}])
        assert [m["role"] for m in talk.messages] == ["system", "user", "assistant"]

    @pytest.mark.parametrize("template", [TRIMS, FORGETS])
    def test_templates_that_rewrite_what_was_said(self, tokenizer_folder: str, template: str) -> None:
        opened = with_template(tokenizer_folder, template)
        talk = Conversation(opened)
        talk.ask("one")
        talk.answer(encode(opened, "  two  "), [])
        assert opened.decode(talk.ask("three")) == render(
            opened, [*talk.messages, {"role": "user", "content": "three"}]
        )

    def test_special_tokens_in_an_answer_are_not_history(self, opened) -> None:
        talk, stops = Conversation(opened), stop_ids(opened)
        talk.ask("x")
        start = opened.convert_tokens_to_ids("<|im_start|>")
        assert talk.answer([*encode(opened, "a"), start, *encode(opened, "b")], stops) == "ab"
        assert talk.ask("y").count(start) == 4

    def test_reset_keeps_the_system_prompt(self, opened) -> None:
        talk = Conversation(opened, system="Be brief.")
        first = talk.ask("x")
        talk.answer(encode(opened, "y"), [])
        talk.reset()
        assert talk.messages == [{"role": "system", "content": "Be brief."}]
        assert talk.ask("x") == first

    def test_saved_is_what_fine_tuning_reads(self, opened, tmp_path: Path) -> None:
        talk = Conversation(opened)
        talk.ask("Wo ist der Fuchs?")
        talk.answer(encode(opened, "Im Bau 🦊"), [])
        talk.save(tmp_path / "x.json")
        assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"messages": talk.messages}
        assert "🦊" in (tmp_path / "x.json").read_text(encoding="utf-8")
        assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
        with pytest.raises(UserError, match="cannot be written"):
            talk.save(tmp_path / "no" / "x.json")

    def test_no_template_and_one_that_refuses(self, tokenizer_folder: str) -> None:
        with pytest.raises(UserError, match=r"no chat template.*chatml"):
            Conversation(load_tokenizer(TokenizerConfig(name=tokenizer_folder))).ask("x")
        refuses = with_template(
            tokenizer_folder,
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ messages }}",
        )
        with pytest.raises(UserError, match=r"refuses this conversation \(system, user\): no system role"):
            Conversation(refuses, system="x").ask("y")
