"""Exports of Hugging Face models are opened as users open them; generation takes them and any such folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.export import export
from llmtrain.errors import UserError
from llmtrain.generation.command import generate_command
from llmtrain.generation.generate import generate
from llmtrain.generation.load import load
from llmtrain.generation.sampling import Sampling
from llmtrain.hf_model import export as hf_export
from llmtrain.hf_model.build import build
from llmtrain.hf_model.config import HFConfig
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.tokenizer import TokenizerConfig, fingerprint_of, load_tokenizer
from llmtrain.training.language_model import LanguageModel
from tests.hf_model.conftest import ROWS, save_model

Folder = Callable[[str], Path]
LORA = {"r": 2, "lora_alpha": 8, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def run(model_folder: Folder, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Architecture and keys of the model -> a run with one checkpoint whose trained weights have moved."""

    def made(architecture: str, base: Path | None = None, **keys: Any) -> Path:
        folder = tmp_path_factory.mktemp("run") / "run"
        place = folder / "checkpoints" / "ep0-ba3"
        place.mkdir(parents=True)
        opened = load_tokenizer(TokenizerConfig(name=str(tokenizer)))
        opened.save_pretrained(folder / "tokenizer")
        cfg = HFConfig(
            name="hf_causal_lm", pretrained_model_name_or_path=str(base or model_folder(architecture)), **keys
        )
        model = LanguageModel(build(cfg, n_tokens=len(opened)), cfg)
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        torch.save({"state": {"model": model.state_dict()}}, place / "full.pt")
        manifest.write(
            place,
            kind="full",
            step=3,
            tokens=0,
            files={"full.pt": manifest.file_entry(place / "full.pt")},
            recipe={"model": cfg.model_dump(mode="json"), "tokenizer": {"name": str(tokenizer)}},
            tokenizer_fingerprint=fingerprint_of(opened),
        )
        (folder / "recipe.yaml").write_text(json.dumps({"model": {"name": "hf_causal_lm"}}))
        return folder

    return made


def trained_logits(run: Path, ids: torch.Tensor) -> torch.Tensor:
    """What the run's own model says, adapters beside the weights."""
    model, _ = load(run, device="cpu")
    assert isinstance(model, HFCausalLM)
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits
    return logits


def some_ids() -> torch.Tensor:
    return torch.randint(3, ROWS, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("gemma2", {"pretrained": False}),
        ("llama", {"peft_config": LORA}),
        ("qwen3", {"peft_config": LORA, "should_save_peft_only": False}),
        ("mpt", {"peft_config": {"target_modules": ["Wqkv", "down_proj"], "bias": "lora_only"}}),
    ],
)
def test_plain_transformers_opens_the_same_function(
    architecture: str, keys: dict[str, Any], run: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = run(architecture, **keys)
    report = export(source, tmp_path / "out")
    assert report.max_difference <= report.tolerance
    assert report.tokens > 0
    assert report.tokenizer
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(
        opened(input_ids=some_ids()).logits, trained_logits(source, some_ids()), rtol=1e-4, atol=1e-4
    )
    fast = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert opened.generation_config.eos_token_id == fast.eos_token_id
    assert opened.config.use_cache
    assert not list((tmp_path / "out").glob("adapter*"))
    assert export(source, tmp_path / "out").done_before


def test_bfloat16_is_written_and_compared(run: Callable[..., Path], tmp_path: Path) -> None:
    export(run("llama", peft_config=LORA), tmp_path / "out", dtype="bf16")
    assert {value.dtype for value in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}


def test_adapters_alone_open_with_peft_on_the_base(
    run: Callable[..., Path], model_folder: Folder, tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    source = run("llama", peft_config={**LORA, "modules_to_save": ["lm_head"]})
    report = export(source, tmp_path / "out", adapter_only=True)
    assert report.adapters
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not names & {"config.json", "model.safetensors"}
    assert "exported by llmtrain" in (tmp_path / "out" / "README.md").read_text()  # not PEFT's form to fill in
    opened = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = trained_logits(source, some_ids())
    torch.testing.assert_close(opened(input_ids=some_ids()).logits, expected, rtol=1e-4, atol=1e-4)
    again, _ = load(tmp_path / "out", device="cpu")
    torch.testing.assert_close(again(some_ids()).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_has_no_adapters_that_stand_alone_is_refused(run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without peft_config"):
        export(run("llama"), tmp_path / "out", adapter_only=True)
    small = save_model(tmp_path / "small", "llama", vocab_size=280)
    with pytest.raises(UserError, match="embeddings were grown"):
        export(run("llama", small, peft_config=LORA), tmp_path / "out", adapter_only=True)
    assert not (tmp_path / "out").exists()
    export(run("llama", small, peft_config=LORA), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 384


def test_a_changed_base_model_is_found(run: Callable[..., Path], tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama")
    source = run("llama", base, peft_config=LORA)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-6
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="not those that they were trained on"):
        export(source, tmp_path / "out")


def test_a_wrong_export_is_found_and_leaves_nothing(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = hf_export.compare_folder

    def after_damage(folder: Path, *args: Any, **kwargs: Any) -> Any:
        config = json.loads((folder / "config.json").read_text())
        config["rms_norm_eps"] = 0.5  # all tensors are equal, and the function is another
        (folder / "config.json").write_text(json.dumps(config))
        return compare(folder, *args, **kwargs)

    monkeypatch.setattr(hf_export, "compare_folder", after_damage)
    with pytest.raises(UserError, match=r"NOT exported.*logits differ"):
        export(run("llama"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma2", "bloom"])
def test_generation_is_transformers_own_for_prompts_of_any_length(
    architecture: str, model_folder: Folder, tokenizer: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model_folder(architecture)).eval()
    model = build(HFConfig(name="hf_causal_lm", pretrained_model_name_or_path=str(model_folder(architecture)))).eval()
    prompts = [[5, 6, 7, 8, 9], [11], [20, 21, 22]]
    answers = generate(model, prompts, max_new_tokens=8)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert answer == expected[0, len(prompt) :].tolist()
    sampled = [generate(model, part, max_new_tokens=4, sampling=Sampling(), seed=3) for part in (prompts[:1], prompts)]
    assert sampled[0][0] == sampled[1][0]
    ended = generate(model, prompts, max_new_tokens=8, eos_ids={answers[0][2]})
    assert ended[0] == answers[0][: answers[0].index(answers[0][2]) + 1]


def test_the_command_continues_prompts_with_a_folder_and_a_run(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = run("qwen3")
    export(source, tmp_path / "out")
    answers = [generate_command(place, ["the quick"], max_new_tokens=5, temperature=0) for place in (source, tmp_path / "out")]  # fmt: skip  # noqa: E501
    assert answers[0][0].tokens == answers[1][0].tokens
    assert "the quick" in capsys.readouterr().out
