"""`llmtrain chat` on a model that has learned one conversation by heart."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.checkpoint.hugging_face import write_hf_folder
from llmtrain.errors import UserError
from llmtrain.generation.chat import Chat
from llmtrain.generation.chat_command import chat_command
from llmtrain.generation.conversation import encode, render
from llmtrain.generation.generate import generate
from llmtrain.generation.sampling import Sampling
from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT
from llmtrain.stop_tokens import stop_ids
from llmtrain.tokenizer import TokenizerConfig, load_tokenizer

QUESTIONS = ("Where is the fox?", "And\tthe dog?")
ANSWERS = ("In its den 🦊!\nAll day.", "Schläft.\t日本")
SYSTEM = "Be brief."
GREEDY = Sampling(temperature=0)


def learned(tokenizer: Any, **changes: Any) -> MPT:
    """A model that knows the conversation, with the system prompt and without."""
    torch.manual_seed(0)
    block = {"d_model": 48, "n_heads": 4, "n_layers": 2, "vocab_size": 512, "max_seq_len": 256, "no_bias": True}
    model = MPT(MPTConfig.model_validate({**block, "attn_config": {"alibi": True}, **changes}))
    turns = [
        {"role": role, "content": text}
        for pair in zip(QUESTIONS, ANSWERS, strict=True)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    rows = [encode(tokenizer, render(tokenizer, x)) for x in ([{"role": "system", "content": SYSTEM}, *turns], turns)]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(120):
        ids = torch.tensor([rows[step % 2]])
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    return model.eval()


@pytest.fixture(scope="module")
def opened(tokenizer: Path) -> Any:
    return load_tokenizer(TokenizerConfig(name=str(tokenizer), chat_template="chatml"))


@pytest.fixture(scope="module")
def model(opened: Any) -> MPT:
    return learned(opened)


@pytest.fixture(scope="module")
def exported(model: MPT, opened: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    opened.save_pretrained(folder / "tokenizer")
    (folder / "hf").mkdir()
    write_hf_folder(folder / "hf", model.config, model.state_dict(), dtype="float32", tokenizer=folder / "tokenizer")
    return folder / "hf"


class TestChat:
    def test_it_answers_and_stops(self, model: MPT, opened: Any) -> None:
        chat = Chat(model, opened, system=SYSTEM, sampling=GREEDY)
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
            pieces = list(chat.say(question))
            assert "".join(pieces) == answer
            assert len(pieces) > 1
            assert not any("\ufffd" in piece for piece in pieces)
            assert not chat.cut_off
        said = [m["content"] for m in chat.conversation.messages]
        assert said == [SYSTEM, QUESTIONS[0], ANSWERS[0], QUESTIONS[1], ANSWERS[1]]

    def test_the_cache_of_earlier_turns_changes_nothing(self, model: MPT, opened: Any) -> None:
        chat = Chat(model, opened, sampling=Sampling(temperature=1.5), max_new_tokens=20, seed=5)
        reused = []
        for turn, question in enumerate(("fox", "lazy dog", "the quick")):
            prompt = chat.conversation.ask(question)
            said = "".join(chat.say(question))
            reused.append(chat.reused)
            alone = generate(
                model,
                [prompt],
                max_new_tokens=20,
                sampling=Sampling(temperature=1.5),
                eos_ids=stop_ids(opened),
                seed=5,
                first_index=2 * turn,
            )
            assert said == opened.decode(alone[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert chat.used == len(prompt) + len(alone[0])
        assert reused[0] == 0
        assert reused[2] > reused[1] > 0
        before = chat.used
        chat.reset()
        list(chat.say("fox"))
        assert chat.used < before

    def test_an_answer_may_be_interrupted(self, model: MPT, opened: Any) -> None:
        chat = Chat(model, opened, sampling=GREEDY)
        pieces = chat.say(QUESTIONS[0])
        start = next(pieces) + next(pieces)
        pieces.close()
        assert chat.cut_off
        assert chat.conversation.messages[-1] == {"role": "assistant", "content": start}
        assert ANSWERS[0].startswith(start)
        whole = "".join(chat.say(QUESTIONS[1]))
        fresh = Chat(model, opened, sampling=GREEDY)
        fresh.conversation.messages = chat.conversation.messages[:2]
        assert "".join(fresh.say(QUESTIONS[1])) == whole

    def test_learned_positions_run_out(self, opened: Any) -> None:
        torch.manual_seed(0)
        model = MPT(MPTConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=512, max_seq_len=64)).eval()
        chat = Chat(model, opened, sampling=Sampling(), max_new_tokens=500)
        list(chat.say("fox"))
        assert chat.cut_off
        assert chat.used == 65  # the last token needs no position
        kept = list(chat.conversation.messages)
        with pytest.raises(UserError, match=r"at most 64: .*max_seq_len.*/reset"):
            list(chat.say("the dog"))
        assert chat.conversation.messages == kept
        chat.reset()
        assert list(chat.say("fox"))


def test_plain_transformers_holds_the_same_conversation(exported: Path) -> None:
    """The export's template, its end of turn and its weights, without any of our code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(exported).eval(), AutoTokenizer.from_pretrained(exported)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTIONS[0]}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    written = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)
    answer = written[0, ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == ANSWERS[0]
    assert tokenizer.convert_ids_to_tokens(int(answer[-1])) == "<|im_end|>"


def talk(monkeypatch: pytest.MonkeyPatch, source: Path, lines: str, **options: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    chat_command(source, temperature=0, **options)


class TestCommand:
    def test_a_conversation_through_a_pipe(
        self, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "talk.json"
        lines = f"{QUESTIONS[0]}\n\n/save {file}\n{QUESTIONS[1]}\n/reset\n{QUESTIONS[0]}\n/exit\nnever asked\n"
        talk(monkeypatch, exported, lines, system=SYSTEM)
        printed = capsys.readouterr()
        assert printed.out == f"{ANSWERS[0]}\n{ANSWERS[1]}\n{ANSWERS[0]}\n"
        assert f"(saved to {file})" in printed.err
        assert "(started over)" in printed.err
        assert [m["role"] for m in json.loads(file.read_text())["messages"]] == ["system", "user", "assistant"]

    def test_a_path_is_no_command(self, exported: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
        talk(monkeypatch, exported, "/usr/bin?\n", max_new_tokens=2)
        assert capsys.readouterr().out.count("\n") >= 1
        with pytest.raises(UserError, match=r"/rest is no command\. /help"):
            talk(monkeypatch, exported, "/rest\n")

    @pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
    def test_lines_that_are_not_utf8(self, exported: Path, errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8", errors))
        with pytest.raises(UserError, match="not UTF-8"):
            chat_command(exported, max_new_tokens=1)

    def test_utf8_is_read_in_a_locale_that_is_not(
        self, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines = f"Schläft.\n/save {tmp_path / 'talk.json'}\n".encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), "ascii", "surrogateescape"))
        chat_command(exported, max_new_tokens=1)
        assert json.loads((tmp_path / "talk.json").read_text())["messages"][0]["content"] == "Schläft."

    def test_ctrl_c_ends_a_conversation_through_a_pipe(self, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Interrupted(io.StringIO):
            asked = 0

            def readline(self, size: int = -1, /) -> str:
                self.asked += 1
                if self.asked == 1:
                    raise KeyboardInterrupt
                return ""

        monkeypatch.setattr(sys, "stdin", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            chat_command(exported, max_new_tokens=1)

    def test_a_model_that_knows_no_conversations(
        self, tmp_path: Path, model: MPT, tokenizer: Path, monkeypatch
    ) -> None:
        write_hf_folder(tmp_path, model.config, model.state_dict(), dtype="float32", tokenizer=tokenizer)
        with pytest.raises(UserError, match=r"no chat template.*llmtrain generate.*chatml"):
            talk(monkeypatch, tmp_path, "hello\n")

    def test_settings_are_checked(self, exported: Path) -> None:
        with pytest.raises(UserError, match="max_new_tokens 0"):
            chat_command(exported, max_new_tokens=0)


def test_a_model_of_transformers_chats_with_its_own_cache(opened: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmtrain.hf_model.model import HFCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=512, max_position_embeddings=256, initializer_range=0.3, **shape)
    model = HFCausalLM(LlamaForCausalLM(config)).eval()
    chat = Chat(model, opened, sampling=GREEDY, max_new_tokens=12)
    for question in QUESTIONS:
        prompt = chat.conversation.ask(question)
        alone = generate(model, [prompt], max_new_tokens=12, eos_ids=stop_ids(opened))[0]
        said = "".join(chat.say(question))
        assert said == opened.decode(alone, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert chat.reused > 0
    chat.reset()
    assert "".join(chat.say(QUESTIONS[0]))
