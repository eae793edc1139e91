"""The example recipe, run: conversations, packed, train adapters of a small Llama; its export has the chat template."""

import json
from pathlib import Path

import pytest

pytest.importorskip("peft")

from llmtrain.checkpoint.export import export
from llmtrain.recipe.check import check
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import launch
from tests.hf_model.conftest import save_model

RECIPE = Path(__file__).parents[2] / "yamls" / "finetune-hf-lora.yaml"


def test_it_is_valid_and_says_what_is_trained() -> None:
    text = check(RECIPE)
    assert "LoRA of rank 16, the rest frozen" in text
    assert "all of it trained" in check(RECIPE, ["model.peft_config=null", "optimizer.lr=1e-5"])


@pytest.mark.slow
@pytest.mark.gloo_training
def test_it_trains_and_exports_on_two_ranks(corpus: TinyCorpus, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = save_model(tmp_path / "model", "llama", vocab_size=640)  # rows for ChatML's two tokens, too
    data = tmp_path / "data"
    data.mkdir()
    for split, numbers in (("train", range(160)), ("val", range(160, 176))):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"{n % 7} plus {n % 5}?"},
                    {"role": "assistant", "content": f"{n % 7 + n % 5}."},
                ]
            }
            for n in numbers
        ]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "finetune-hf-lora.yaml"
    recipe.write_text(RECIPE.read_text())
    overrides = [
        f"variables.model={model}",
        f"tokenizer.name={corpus.tokenizer}",
        f"variables.data={data}",
        "max_seq_len=96",
        "global_train_batch_size=4",
        "scheduler.t_warmup=0ba",
        "optimizer.lr=1e-2",
        "max_duration=12ba",
        "eval_interval=12ba",
        "train_loader.num_workers=0",
        "eval_loader.num_workers=0",
        "train_loader.dataset.cache_dir=cache",
        "eval_loader.dataset.cache_dir=cache",
        "model.peft_config.lora_dropout=0",
        "callbacks.generate_callback={prompts: ['1 plus 1?'], max_new_tokens: 4}",
    ]
    finished = launch(recipe, overrides, ranks=2, cwd=tmp_path)
    assert finished.code == 0, finished.output
    losses = list(finished.metrics("metrics/eval/LanguageCrossEntropy").values())
    assert losses[-1] < losses[0] - 0.2
    # Before the first step, and at the end.
    assert len((finished.folder / "samples.jsonl").read_text().splitlines()) == 2
    report = export(finished.folder, tmp_path / "out")
    assert report.tokenizer
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1 plus 1?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    assert "<|im_start|>assistant" in tokenizer.decode(ids[0])
    assert opened(input_ids=ids).logits.shape[-1] == 640
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in opened.generation_config.eos_token_id
