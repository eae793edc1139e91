import io
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.checkpoint.hugging_face import write_hf_folder
from llmtrain.errors import UserError
from llmtrain.generation.command import generate_command
from llmtrain.generation.load import load


def test_texts_come_back_in_order_and_are_printed(exported: Path, capsys) -> None:
    done = generate_command(exported, ["the quick", "lazy [dog]", ""], max_new_tokens=9, temperature=0, batch_size=2)
    printed = capsys.readouterr().out
    assert "the quick" + done[0].text.split("\n")[0] in printed
    assert "lazy [dog]" in printed
    prompts = ["the quick", "lazy [dog]", ""]
    one_by_one = [generate_command(exported, [p], max_new_tokens=9, temperature=0)[0].text for p in prompts]
    assert one_by_one == [c.text for c in done]


def test_the_same_seed_the_same_text(exported: Path) -> None:
    def write(seed: int, batch_size: int) -> list[str]:
        prompts = ["the quick", "the quick", "fox"]
        return [
            c.text for c in generate_command(exported, prompts, max_new_tokens=20, seed=seed, batch_size=batch_size)
        ]

    assert write(1, 8) == write(1, 8) == write(1, 2)
    assert write(1, 8) != write(2, 8)
    assert write(1, 8)[0] != write(1, 8)[1]


def test_a_text_file_has_a_prompt_a_line(exported: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "in.txt").write_text("the\r\n\nfox jumps\n")
    generate_command(exported, ["first"], prompts_file=tmp_path / "in.txt", max_new_tokens=2)
    printed = capsys.readouterr().out
    assert [printed.index(text) for text in ("first", "the", "fox jumps")] == sorted(
        printed.index(text) for text in ("first", "the", "fox jumps")
    )
    assert printed.count("───\n") == 3


def test_standard_input_is_one_prompt(exported: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("def f(x):\n    return\n"))
    assert len(generate_command(exported, max_new_tokens=2)) == 1
    assert capsys.readouterr().out.startswith("def f(x):\n    return")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(UserError, match="no prompt"):
        generate_command(exported)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"temperature": -1}, "temperature -1"),
        ({"dtype": "int8"}, "dtype int8"),
    ],
)
def test_settings_are_checked(exported: Path, settings: dict, match: str) -> None:
    with pytest.raises(UserError, match=match):
        generate_command(exported, ["x"], **settings)


def test_eos_ends_the_text_and_is_not_shown(exported: Path) -> None:
    done = generate_command(exported, ["the"] * 60, max_new_tokens=30, temperature=3.0, batch_size=60)
    ended = [c for c in done if c.finished]
    assert ended
    assert all(c.tokens[-1] == 0 and 0 not in c.tokens[:-1] and "<|endoftext|>" not in c.text for c in ended)
    assert all(len(c.tokens) == 30 for c in done if not c.finished)


def test_loading_without_a_tokenizer(tmp_path: Path, model) -> None:
    write_hf_folder(tmp_path, model.config, model.state_dict(), dtype="float32", tokenizer=None)
    with pytest.raises(UserError, match="no tokenizer is known"):
        load(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "nothing")


def test_importing_the_command_is_light() -> None:
    code = "import sys, llmtrain.generation.command; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
