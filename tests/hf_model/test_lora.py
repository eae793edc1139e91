"""Adapters: what is trained, what is frozen, and what goes into a checkpoint."""

import builtins
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from llmtrain.errors import UserError
from llmtrain.hf_model.build import build
from llmtrain.hf_model.config import HFConfig
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.hf_model.source import open_hf
from llmtrain.training.activation_checkpointing import apply
from llmtrain.training.language_model import LanguageModel
from tests.hf_model.conftest import ROWS, save_model

Folder = Callable[[str], Path]


def config(folder: Path, lora: dict[str, Any], **keys: Any) -> HFConfig:
    return HFConfig(name="hf_causal_lm", pretrained_model_name_or_path=str(folder), peft_config=lora, **keys)


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [("llama", ("q_proj", "v_proj")), ("qwen3", "all-linear"), ("gpt_neox", None), ("mpt", ("Wqkv",))],
)
def test_adapters_alone_are_trained_and_begin_as_the_base_model(
    architecture: str, targets: Any, model_folder: Folder
) -> None:
    base = build(HFConfig(name="hf_causal_lm", pretrained_model_name_or_path=str(model_folder(architecture)))).eval()
    cfg = config(model_folder(architecture), {"r": 2, "target_modules": targets})
    adapted = build(cfg).eval()
    ids = torch.randint(ROWS, (2, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(adapted(ids).logits, base(ids).logits)
    assert trained(adapted)
    assert all(".lora_" in name for name in trained(adapted))
    adapted(ids, ids).loss.backward()
    assert {name for name, p in adapted.named_parameters() if p.grad is not None} == trained(adapted)
    meta = build(cfg, device="meta")
    assert trained(meta) == trained(adapted)
    assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in adapted.named_parameters()}


def test_the_gradients_are_peft_s_own(model_folder: Folder) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder("llama")),
        peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=16, target_modules=["q_proj", "down_proj"]),
    )
    ours = build(config(model_folder("llama"), {"r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]}))
    values = {name: 0.1 * torch.randn_like(p) for name, p in theirs.named_parameters() if p.requires_grad}
    for model in (ours, theirs):
        with torch.no_grad():
            for name, value in values.items():
                model.get_parameter(name).copy_(value)
    ids = torch.randint(ROWS, (2, 16), generator=torch.Generator().manual_seed(0))
    found, expected = ours(ids, ids).loss, theirs(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    for name in values:
        torch.testing.assert_close(ours.get_parameter(name).grad, theirs.get_parameter(name).grad, msg=name)


def test_layers_to_train_whole_are_trained_and_used(model_folder: Folder) -> None:
    lora = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    adapted = build(config(model_folder("llama"), lora), n_tokens=ROWS + 1)
    assert {n.rsplit("modules_to_save", 1)[0] for n in trained(adapted) if "modules_to_save" in n} == {
        "base_model.model.lm_head.",
        "base_model.model.model.embed_tokens.",
    }
    ids = torch.randint(ROWS, (2, 16), generator=torch.Generator().manual_seed(0))
    out = adapted(ids, ids)
    expected = adapted.hf(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_new_tokens_that_stay_frozen_are_pointed_out(model_folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    build(config(model_folder("llama"), {"target_modules": ["q_proj"]}), n_tokens=ROWS + 3)
    assert "needs 3 more embeddings" in caplog.text
    assert "modules_to_save" in caplog.text


def test_checkpoints_hold_what_is_trained_and_a_hash_of_the_rest(model_folder: Folder, tmp_path: Path) -> None:
    cfg = config(model_folder("llama"), {"target_modules": ["q_proj"]})
    model = LanguageModel(build(cfg), cfg)
    state = model.state_dict()
    assert set(state) == {f"model.{name}" for name in trained(model.model)} | {"model.frozen_weights_hash"}
    assert model.load_state_dict(state).missing_keys  # the frozen ones, and that is no error
    with pytest.raises(RuntimeError, match="missing keys"):
        model.load_state_dict({"model.frozen_weights_hash": state["model.frozen_weights_hash"]})
    assert isinstance(model.model, HFCausalLM)
    model.model.check_frozen_identity()
    other = config(save_model(tmp_path / "other", "llama", rms_norm_eps=1e-3), {"target_modules": ["q_proj"]})
    same_values = build(other)
    assert same_values.frozen_identity() == model.model.frozen_identity()
    with torch.no_grad():
        same_values.get_parameter("base_model.model.model.norm.weight")[0] += 1e-6
    assert same_values.frozen_identity() != model.model.frozen_identity()
    model.load_state_dict({**state, "model.frozen_weights_hash": torch.tensor(same_values.frozen_identity())})
    with pytest.raises(UserError, match="not those that they were trained on"):
        model.model.check_frozen_identity()


def test_adapters_are_loaded_into_checkpointed_blocks(model_folder: Folder) -> None:
    cfg = config(model_folder("llama"), {"r": 4})
    model = LanguageModel(build(cfg), cfg)
    names = list(model.state_dict())
    assert isinstance(model.model, HFCausalLM)
    assert apply(model.model, "full") == 2
    state = model.state_dict()
    assert list(state) == names
    model.load_state_dict(state)
    lost = next(name for name in state if "lora_A" in name)
    with pytest.raises(RuntimeError, match="missing keys"):
        model.load_state_dict({name: value for name, value in state.items() if name != lost})


def test_an_adapter_is_continued_and_must_be_the_one_described(model_folder: Folder, tmp_path: Path) -> None:
    first = build(config(model_folder("llama"), {"r": 2, "target_modules": ["q_proj"]}))
    with torch.no_grad():
        for name in trained(first):
            first.get_parameter(name).normal_()
    first.peft.save_pretrained(tmp_path)
    again = build(
        config(model_folder("llama"), {"r": 2, "target_modules": ["q_proj"]}, pretrained_lora_id_or_path=str(tmp_path))
    )
    assert all(torch.equal(first.get_parameter(name), again.get_parameter(name)) for name in trained(first))
    for lora, key in (({"r": 4, "target_modules": ["q_proj"]}, r"peft_config\.r"), ({"r": 2, "target_modules": ["v_proj"]}, "target_modules")):  # fmt: skip  # noqa: E501
        with pytest.raises(UserError, match=key):
            build(config(model_folder("llama"), lora, pretrained_lora_id_or_path=str(tmp_path)))


def test_an_adapter_that_is_damaged_or_would_run_code_is_one_line(model_folder: Folder, tmp_path: Path) -> None:
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    build(config(model_folder("llama"), lora)).peft.save_pretrained(str(tmp_path))
    weights, ran = tmp_path / "adapter_model.safetensors", tmp_path / "ran"
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    about["base_model_name_or_path"] = str(model_folder("llama"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            open_hf(tmp_path)
        with pytest.raises(UserError, match="cannot be opened"):
            build(config(model_folder("llama"), lora, pretrained_lora_id_or_path=str(tmp_path)))

    weights.write_bytes(weights.read_bytes()[:99])
    refused("damaged")
    weights.unlink()
    refused("has no adapter_model.safetensors")
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({"x": _Runs(ran)}, protocol=2))
    refused("would run code")
    assert not ran.exists()


class _Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (open, (str(self.marker), "w"))


def test_layers_that_do_not_exist_are_named(model_folder: Folder) -> None:
    with pytest.raises(UserError, match=r"peft_config: .*query_key"):
        build(config(model_folder("llama"), {"target_modules": ["query_key"]}))


def test_a_missing_package_is_said_with_the_line_that_installs_it(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_peft(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    cfg = config(model_folder("llama"), {})
    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(UserError, match=r"pip install 'llmtrain\[peft\]'"):
        build(cfg)
