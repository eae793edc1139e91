"""The picture of the first batch says which tokens are trained, and the counts are those of the data."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from llmtrain.data.command import show_command
from llmtrain.data.finetuning.show import count, describe
from llmtrain.errors import UserError
from tests.data.finetuning.conftest import chat, write_rows


def marked(text, mark):
    return [line.removeprefix(mark) for line in text.splitlines() if line.startswith(mark)]


def test_the_lines_that_are_marked_are_what_is_trained(build, chat_tokenizer, tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [chat(0, 2), chat(1, 150), chat(2, 0)])
    loader = build(files=str(path), batch_size=3, target_prompts="none")
    shown = describe(loader, chat_tokenizer)
    assert marked(shown.full, " train | ")[0] == "0: yes yes done<|im_end|>"
    assert marked(shown.full, "       | ")[:4] == [
        "<|im_start|>user⏎",
        "Say 0.<|im_end|>⏎",
        "<|im_start|>assistant⏎",
        "⏎",
    ]
    assert f"Example 1: {path}, line 1 (" in shown.full
    assert "'⏎' > '0' ':'" in shown.full
    assert "'<|im_end|>' < '⏎'" in shown.full
    assert marked(shown.full, " train | ")[1].count("yes") > 20
    assert "1 x truncated" in shown.full
    (batch,) = loader
    trained = int((batch["labels"] != -100).sum())
    assert shown.counts.trained_tokens == trained
    assert f"{shown.counts.tokens:,} tokens, {trained:,} of them trained" in shown.full


def test_on_a_screen_long_texts_and_many_rows_are_shortened(build, chat_tokenizer, tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [chat(number, 30) for number in range(9)])
    shown = describe(build(files=str(path), batch_size=8, max_seq_len=256), chat_tokenizer)
    assert "... and 6 more rows like these" in str(shown)
    assert len(str(shown)) < len(shown.full)
    assert shown.full.count("Row ") == 8
    printed = Console(file=io.StringIO(), width=200)
    printed.print(shown)
    assert printed.file.getvalue().strip() == str(shown).strip()


def test_brackets_of_a_text_are_no_markup(build, chat_tokenizer, tmp_path):
    row = {"prompt": "[red]a[/red]", "response": "[bold]b \x1b[31m"}
    path = write_rows(tmp_path / "x.jsonl", [row])
    shown = describe(build(files=str(path), batch_size=1), chat_tokenizer)
    printed = Console(file=io.StringIO(), width=200)
    printed.print(shown)
    assert "[red]a[/red]" in printed.file.getvalue()
    assert "\x1b" not in printed.file.getvalue()


@pytest.mark.parametrize("keys", [{"packing": True}, {}, {"pad_to_longest": True}, {"allow_pad_trimming": True}])
def test_padding_is_that_of_the_batches(build, keys):
    loader = build(**keys)
    counts = count(loader)
    real = total = 0
    for batch in loader:
        real += int(batch["attention_mask"].sum())
        total += batch["attention_mask"].numel()
    assert counts.padding == pytest.approx(1 - real / total)
    assert counts.efficiency == (pytest.approx(real / total) if "packing" in keys else None)
    assert counts.batches == len(loader)


def recipe(tmp_path: Path, corpus, loader: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(
        f"""
model: {{name: mpt_causal_lm, d_model: 32, n_heads: 2, n_layers: 1, vocab_size: 384}}
tokenizer: {{name: {corpus.tokenizer}}}
max_seq_len: 128
max_duration: 1ep
optimizer: {{name: decoupled_adamw, lr: 1.0e-3}}
scheduler: {{name: constant_with_warmup, t_warmup: 0ba}}
global_train_batch_size: 4
device_train_microbatch_size: 4
train_loader: {loader}
"""
    )
    return path


def test_the_command(tmp_path, corpus, chats):
    loader = f"{{name: finetuning, dataset: {{files: {chats}, cache_dir: {tmp_path / 'cache'}, packing_ratio: auto}}}}"
    console = Console(file=io.StringIO(), width=200)
    overrides = ["train_loader.dataset.shuffle=true", "model.attn_config.attn_uses_sequence_id=true"]
    show_command(recipe(tmp_path, corpus, loader), overrides, console)
    printed = console.file.getvalue()
    assert "dataset.packing_ratio: auto switches packing on" in printed
    assert "120 rows read, 120 examples" in printed
    assert "packing fills" in printed
    assert " train | " in printed
    assert not (tmp_path / "runs").exists()


def test_a_recipe_for_pretraining_has_nothing_to_show(tmp_path, corpus):
    loader = f"{{name: text, dataset: {{local: {corpus.train}}}}}"
    with pytest.raises(UserError, match=r"train_loader\.name is 'text': all its tokens are trained"):
        show_command(recipe(tmp_path, corpus, loader))
