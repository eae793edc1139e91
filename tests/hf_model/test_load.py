"""Opening models: what is missing is named, embeddings grow to the mean, nothing is unpickled freely."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtrain.errors import UserError
from llmtrain.hf_model.build import build
from llmtrain.hf_model.config import HFConfig
from llmtrain.hf_model.model import HFCausalLM
from tests.hf_model.conftest import ROWS, save_model

Folder = Callable[[str], Path]


def opened(folder: Path | str, n_tokens: int = 0, **keys: Any) -> HFCausalLM:
    cfg = HFConfig(name="hf_causal_lm", pretrained_model_name_or_path=str(folder), **keys)
    return build(cfg, n_tokens=n_tokens)


@pytest.mark.parametrize(("architecture", "tables"), [("llama", 2), ("qwen3", 1), ("gpt_neox", 2), ("phi", 2)])
def test_embeddings_grow_to_a_multiple_of_128_rows_of_the_mean(
    architecture: str, tables: int, model_folder: Folder
) -> None:
    before = dict(opened(model_folder(architecture), ROWS).named_parameters())
    after = dict(opened(model_folder(architecture), ROWS + 1).named_parameters())
    assert before.keys() == after.keys()
    for name, old in before.items():
        new = after[name]
        if not set(old.shape) & {ROWS}:
            assert torch.equal(old, new), name
            continue
        assert new.shape[0] == 384
        assert torch.equal(new[:ROWS], old), name
        torch.testing.assert_close(new[ROWS:], old.mean(0, keepdim=True).expand_as(new[ROWS:]))
    assert [p.shape[0] for p in after.values() if p.dim() == 2].count(384) == tables


def test_growth_may_be_forbidden(model_folder: Folder) -> None:
    with pytest.raises(UserError, match=r"301 tokens and the model 300 .*allow_embedding_resizing"):
        opened(model_folder("llama"), ROWS + 1, allow_embedding_resizing=False)


def test_config_overrides_change_the_config_and_unknown_keys_are_named(model_folder: Folder) -> None:
    made = opened(model_folder("llama"), config_overrides={"attention_dropout": 0.25})
    assert made.config.attention_dropout == 0.25
    with pytest.raises(UserError, match=r"config_overrides.atention_dropout: .* no such key. Known: .*attention_dropout"):  # fmt: skip  # noqa: E501
        opened(model_folder("llama"), config_overrides={"atention_dropout": 0.25})


def test_shapes_that_do_not_fit_the_weights_are_refused(model_folder: Folder) -> None:
    with pytest.raises(UserError, match=r"size mismatch|mismatched keys|ignore_mismatched_sizes"):
        opened(model_folder("llama"), config_overrides={"intermediate_size": 64})


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "llama", "llama")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing keys: model.layers.1.mlp.up_proj.weight"):
        opened(folder)


def test_new_weights_follow_the_seed_and_the_config_alone(model_folder: Folder) -> None:
    made = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        made.append(opened(model_folder("llama"), pretrained=False, config_overrides={"intermediate_size": 64}))
    first, same, other = (model.get_parameter("model.layers.0.mlp.up_proj.weight") for model in made)
    assert first.shape == (64, 32)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


class _Runs:
    """A pickle of this makes a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_bin_files_are_read_without_running_them(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "llama", "llama")
    weights = load_file(folder / "model.safetensors")
    expected = opened(folder).get_parameter("lm_head.weight")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert torch.equal(opened(folder).get_parameter("lm_head.weight"), expected)
    ran = tmp_path / "ran"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": _Runs(ran)}, protocol=2))
    with pytest.raises(UserError, match="cannot be loaded"):
        opened(folder)
    assert not ran.exists()


@pytest.mark.parametrize("kept", [0, 20, 4000])
def test_damaged_weights_are_one_line(kept: int, tmp_path: Path) -> None:
    file = save_model(tmp_path / "llama", "llama") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"weights of .*llama.* cannot be loaded: .*damaged"):
        opened(tmp_path / "llama")


def test_a_damaged_config_is_one_line(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "llama", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": "x", "num_attention_heads": "x"}))
    with pytest.raises(UserError, match=r"llama"):
        opened(folder)


def test_code_of_a_model_is_not_run_unless_trusted(tmp_path: Path) -> None:
    folder = tmp_path / "custom"
    folder.mkdir()
    config = {"model_type": "custom", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="trust_remote_code"):
        opened(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "a/b/c"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(UserError, match="no folder"):
        opened(name)


def test_a_hub_name_that_cannot_be_fetched_is_one_line() -> None:
    with pytest.raises(UserError, match="'org/no-such-model' cannot be opened"):
        opened("org/no-such-model")
