"""README.md of an export: read as the hub reads it, and true."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import ModelCard

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.model_card import CardFacts, checksum_of, model_card
from llmtrain.model.config import MPTConfig

FACTS = CardFacts(1_234_567, "bfloat16", 1e-6, 2e-5, 100, 48)
PLAIN = SimpleNamespace(name="mpt", reason=None)
SECRET = "hf_planted0secret"


def write_run(folder: Path, **changes: Any) -> Path:
    checkpoint = folder / "checkpoints" / "ep0-ba7"
    checkpoint.mkdir(parents=True)
    (checkpoint / "full.pt").write_bytes(b"x")
    recipe = {
        "model": {"name": "mpt_causal_lm"},
        "train_loader": {
            "dataset": {
                "streams": {
                    "code": {"remote": f"s3://me:{SECRET}@place/code", "proportion": 0.25},
                    "books": {"local": "data/books", "proportion": 0.75, "split": "train"},
                }
            }
        },
        "eval_loader": [{"label": "wiki", "dataset": {"local": "data/wiki"}}],
        "loggers": {"wandb": {"api_key": SECRET}},
        **changes,
    }
    files = {"full.pt": manifest.file_entry(checkpoint / "full.pt")}
    manifest.write(
        checkpoint, kind="full", step=7, tokens=2_000_000_000, files=files, recipe=recipe, tokenizer_fingerprint=None
    )
    rows = [
        {"step": 6, "loss/train/total": 2.5, "time/x": 3},
        {"step": 7, "metrics/eval/LanguageCrossEntropy": 2.25},
        {"step": 7, "loss/train/total": 1.75},  # of the step after the checkpoint
        {"step": 9, "metrics/eval/LanguageCrossEntropy": 1.125},
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 1')
    return checkpoint


def test_the_hub_reads_it_and_it_is_true(tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path / "run", metadata={"license": "apache-2.0"})
    config = MPTConfig(d_model=96, n_heads=6, n_layers=3, max_seq_len=4096, attn_config={"alibi": True})
    text = model_card(checkpoint, layout=PLAIN, config=config, facts=FACTS, name="mine")
    card = ModelCard(text, ignore_metadata_errors=False)
    assert card.data.license == "apache-2.0"
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.tags == ["llmtrain", "mpt"]
    for wanted in (
        "# mine",
        "1,234,567 in bfloat16",
        "- layers: 3\n",
        "6 of width 16",
        "ALiBi, alibi_bias_max 8",
        "4,096 tokens",
        "optimizer steps: 7\n",
        "tokens seen: 2,000,000,000",
        "| code | `s3://***@place/code` | proportion 0.25 |",
        "| books | `data/books (train)` | proportion 0.75 |",
        "Evaluated on (wiki)",
        "| loss/train/total | 2.5 | 6 |",
        "| metrics/eval/LanguageCrossEntropy | 2.25 | 7 |",
        f"`{checksum_of(checkpoint)}`",
        "within 1.0e-06 (allowed: 2.0e-05) at 100 positions, 48 greedy tokens",
    ):
        assert wanted in text, wanted
    assert "trust_remote_code" not in text
    assert SECRET not in text
    assert "1.75" not in text
    assert "1.125" not in text
    assert "time/x" not in text


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"")
    text = model_card(tmp_path / "x.pt", layout=PLAIN, config=MPTConfig(), facts=FACTS, name="mine")
    card = ModelCard(text)
    assert (card.data.license, card.data.license_name) == ("other", "unknown")
    assert "License: unknown. Set one" in text
    assert not any(title in text for title in ("## Training", "## Data", "## Metrics"))
    assert "None" not in text


def test_the_reason_for_remote_code_stands_in_it(tmp_path: Path) -> None:
    layout = SimpleNamespace(name="code", reason="transformers' MPT ignores alibi_bias_max.")
    text = model_card(
        tmp_path / "x.pt", layout=layout, config=MPTConfig(), facts=FACTS, name="mine", license="My own terms"
    )
    card = ModelCard(text)
    assert "custom_code" in card.data.tags
    assert (card.data.license, card.data.license_name) == ("other", "My own terms")
    assert "trust_remote_code=True" in text
    assert "transformers' MPT ignores alibi_bias_max." in text


def test_evaluations_of_this_checkpoint(tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path / "run")
    (tmp_path / "run" / "eval").mkdir()
    found = {
        "lengths": [{"max_seq_len": 2048, "loss": 2.125, "targets": 99}],
        "tasks": [{"task": "hellaswag", "num_fewshot": 10, "metric": "acc_norm", "value": 0.7757}],
    }
    (tmp_path / "run" / "eval" / "ep0-ba7.json").write_text(json.dumps(found))
    text = model_card(checkpoint, layout=PLAIN, config=MPTConfig(), facts=FACTS, name="mine")
    assert "| 2048 | 2.1250 | 99 |" in text
    assert "| hellaswag | 10 | acc_norm | 0.7757 |" in text


def test_a_hub_name_is_the_base_model_and_a_folder_is_not(tmp_path: Path) -> None:
    for place, wanted in (("mosaicml/mpt-7b", "mosaicml/mpt-7b"), (str(tmp_path), None)):
        block = {"name": "hf_causal_lm", "pretrained_model_name_or_path": place, "pretrained": True}
        text = model_card(
            tmp_path / "x.pt", layout=None, config=None, facts=FACTS, name="mine", recipe={"model": block}
        )
        assert ModelCard(text).data.base_model == wanted
        assert f"trained from `{place}`" in text
