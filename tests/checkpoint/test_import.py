"""Every source to every target, bit by bit; and what must not become a checkpoint."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from llmtrain import cli
from llmtrain.checkpoint import import_command, manifest
from llmtrain.checkpoint.export import export
from llmtrain.checkpoint.hugging_face_config import to_hugging_face
from llmtrain.checkpoint.import_command import import_weights
from llmtrain.checkpoint.sharded_writer import write_sharded
from llmtrain.checkpoint.source import open_source
from llmtrain.checkpoint.weights import InMemory, Weights
from llmtrain.checkpoint.weights_files import write_weights
from llmtrain.errors import UserError
from llmtrain.generation.load import load
from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT

from .conftest import PLAIN, Run

RECIPE = """
max_seq_len: 64
model: {name: mpt_causal_lm, d_model: 32, n_heads: 4, n_layers: 2, vocab_size: 384, no_bias: true,
  expansion_ratio: 4, attn_config: {alibi: true}}
tokenizer: {name: TOKENIZER}
train_loader: {name: text, dataset: {local: data, split: train}}
optimizer: {name: decoupled_adamw, lr: 1.0e-3}
scheduler: {name: constant_with_warmup, t_warmup: 2ba}
max_duration: 4ba
global_train_batch_size: 4
device_train_microbatch_size: 4
"""
MOSAIC = {
    "model_type": "mpt",
    "architectures": ["MPTForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig", "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM"},
    **{key: value for key, value in PLAIN.items() if key != "attn_config"},
    "attn_config": {"alibi": True, "alibi_bias_max": 8, "attn_impl": "triton", "prefix_lm": False},
    "torch_dtype": "bfloat16",
    "verbose": 0,
}


def weights_of(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    config = MPTConfig.model_validate({**PLAIN, "init_config": {"name": "baseline_", "init_std": 0.2}})
    return {name: value.to(dtype) for name, value in MPT(config).state_dict().items()}


def same(found: Weights, wanted: dict[str, Tensor]) -> bool:
    return set(found) == set(wanted) and all(
        (found[n].dtype, found.dtype(n), found.shape(n)) == (wanted[n].dtype, wanted[n].dtype, wanted[n].shape)
        and torch.equal(found[n], wanted[n])
        for n in wanted
    )


def hugging_face(folder: Path, weights: dict[str, Tensor], kind: str, limit: int, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder, InMemory(weights), limit, kind)
    return folder


def native(**changes: Any) -> dict[str, Any]:
    return to_hugging_face(MPTConfig.model_validate({**PLAIN, **changes}), "bfloat16", {})


def by_torch(folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """Two .bin files and an index, as transformers writes them: with torch.save, and the head beside the embedding."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    named = {**weights, "lm_head.weight": weights["transformer.wte.weight"]}
    index = {}
    for number, names in enumerate((list(named)[:5], list(named)[5:]), start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: named[name] for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (folder / "pytorch_model.bin.index.json").write_text(text)
    return folder


def wrapped(weights: dict[str, Tensor]) -> dict[str, Any]:
    """As llm-foundry saves a compiled model with checkpointed activations, and the optimizer beside it."""
    model = {
        f"model.{n.replace('blocks.0.', 'blocks.0._checkpoint_wrapped_module.')}": value for n, value in weights.items()
    }
    model["model.lm_head.weight"] = weights["transformer.wte.weight"]
    moments = {"model.transformer.wte.weight": {"exp_avg": torch.ones(3)}}
    return {"state": {"model": model, "optimizers": {"DecoupledLionW": {"state": moments}}}, "rng": []}


def ours(run: Run, kind: str) -> Path:
    return run.save(step=7, kind=kind, dtype=torch.bfloat16)[0]


def foundry_full(place: Path, weights: dict[str, Tensor]) -> Path:
    torch.save(wrapped(weights), place / "ep0-ba7-rank0.pt")
    return place / "ep0-ba7-rank0.pt"


def foundry_sharded(place: Path, weights: dict[str, Tensor]) -> Path:
    dcp.save(wrapped(weights), checkpoint_id=place / "ep0-ba7")
    return place / "ep0-ba7"


SOURCES: dict[str, Callable[[Path, dict[str, Tensor]], Path]] = {
    "foundry-full": foundry_full,
    "foundry-sharded": foundry_sharded,
    "safetensors": lambda place, w: hugging_face(place / "hf", w, "safetensors", 10**9, native()),
    "safetensors-index": lambda place, w: hugging_face(place / "hf", w, "safetensors", 20_000, native()),
    "bin": lambda place, w: hugging_face(place / "hf", w, "bin", 10**9, native()),
    "bin-index": lambda place, w: by_torch(place / "hf", w, native()),
    "mosaic-bin-index": lambda place, w: by_torch(place / "hf", w, MOSAIC),
    "mosaic-safetensors": lambda place, w: hugging_face(place / "hf", w, "safetensors", 10**9, MOSAIC),
}
TARGETS: dict[str, Callable[..., Any]] = {
    "sharded": lambda source, target, recipe: import_weights(source, target, to="sharded", recipe=recipe),
    "full": lambda source, target, recipe: import_weights(source, target, to="full", recipe=recipe),
    "safetensors": lambda source, target, recipe: export(
        source, target, dtype="bf16", recipe=recipe, max_shard_size=20_000
    ),
    "bin": lambda source, target, recipe: export(
        source, target, dtype="bf16", recipe=recipe, weights_format="bin", max_shard_size="30KB"
    ),
}


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("TOKENIZER", str(tokenizer)))
    return path


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", [*SOURCES, "ours-sharded", "ours-full"])
def test_every_source_to_every_target_bit_by_bit(run, tmp_path: Path, recipe: Path, source: str, target: str) -> None:
    if source.startswith("ours"):
        place, weights = run.save(step=7, kind=source.removeprefix("ours-"), dtype=torch.bfloat16)
    else:
        weights = weights_of()
        place = SOURCES[source](tmp_path, weights)
    given = recipe if source.startswith("foundry") else None
    report = TARGETS[target](place, tmp_path / "target", given)
    assert report.parameters == sum(value.numel() for value in weights.values())
    opened = open_source(tmp_path / "target")
    assert same(opened.weights, weights)
    wanted = open_source(place, given).config
    assert (opened.config.n_layers, opened.config.attn_config.alibi) == (wanted.n_layers, True)
    assert report.tokenizer == (source.startswith(("ours", "foundry")))
    assert (opened.tokenizer is not None) == report.tokenizer
    assert not [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")]
    torch_files = [*(tmp_path / "target").rglob("*.pt"), *(tmp_path / "target").rglob("*.bin")]
    for file in torch_files:  # torch itself opens what we wrote, mapped or not
        for mapped in (True, False):
            content = torch.load(file, weights_only=True, mmap=mapped)
            tensors = content["state"]["model"] if "state" in content else content
            assert all(torch.equal(v, weights[n.removeprefix("model.")]) for n, v in tensors.items())


class TestCheckpoint:
    def test_it_generates_exports_and_can_be_moved(self, run, tmp_path: Path) -> None:
        _, weights = run.save(step=7)
        import_weights(run.folder, tmp_path / "there")
        content = manifest.read(tmp_path / "there")
        assert (content.step, content.tokens, content.weights_only, content.kind) == (7, 700, True, "sharded")
        (tmp_path / "there").rename(tmp_path / "moved")
        shutil.rmtree(run.folder)
        model, tokenizer = load(tmp_path / "moved", device="cpu")
        assert torch.equal(model.transformer.wte.weight, weights["transformer.wte.weight"])
        assert len(tokenizer) > 200
        assert export(tmp_path / "moved", tmp_path / "out").tokenizer
        assert same(open_source(tmp_path / "out").weights, weights)

    def test_what_no_export_can_express_is_imported(self, run, tmp_path: Path) -> None:
        _, weights = run.save(attn_config={"alibi": True, "alibi_bias_max": 16, "qk_ln": True}, no_bias=False)
        import_weights(run.folder, tmp_path / "there", to="full")
        opened = open_source(tmp_path / "there" / "full.pt")
        assert opened.config.attn_config.alibi_bias_max == 16
        assert opened.tokenizer is not None
        assert same(opened.weights, weights)

    def test_torch_itself_loads_the_sharded_one(self, tmp_path: Path) -> None:
        weights = weights_of(torch.float32)
        write_sharded(tmp_path / "dcp", InMemory(weights))
        state = {"state": {"model": {f"model.{n}": torch.zeros_like(v) for n, v in weights.items()}}}
        dcp.load(state, checkpoint_id=tmp_path / "dcp")
        assert all(torch.equal(state["state"]["model"][f"model.{n}"], v) for n, v in weights.items())

    def test_another_tokenizer_in_it_is_refused(self, run, tmp_path: Path) -> None:
        run.save()
        import_weights(run.folder, tmp_path / "there")
        file = tmp_path / "there" / "tokenizer" / "tokenizer.json"
        content = json.loads(file.read_text())
        a, b = list(content["model"]["vocab"])[10:12]
        content["model"]["vocab"][a], content["model"]["vocab"][b] = 11, 10
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match="fingerprint differs"):
            open_source(tmp_path / "there")


class TestRefused:
    def test_what_is_at_the_target_stays(self, run, tmp_path: Path) -> None:
        place, _ = run.save(step=3)
        before = sorted(place.iterdir())
        for overwrite in (False, True):
            with pytest.raises(UserError, match="training continues from"):
                import_weights(run.folder, place, overwrite=overwrite)
        assert sorted(place.iterdir()) == before
        import_weights(run.folder, tmp_path / "there")
        with pytest.raises(UserError, match="--overwrite"):
            import_weights(run.folder, tmp_path / "there")
        with pytest.raises(UserError, match="is the source itself"):
            import_weights(tmp_path / "there", tmp_path / "there", overwrite=True)
        _, newer = run.save(step=9)
        import_weights(run.folder, tmp_path / "there", overwrite=True)
        assert same(open_source(tmp_path / "there").weights, newer)

    def test_a_difference_leaves_nothing(self, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run.save()
        real = import_command.write_sharded

        def nudged(folder: Path, weights: Weights, *args: Any) -> None:
            tensors = dict(weights)
            value = tensors["transformer.norm_f.weight"]
            value[3] = torch.nextafter(value[3], torch.tensor(9.0))
            real(folder, InMemory(tensors), *args)

        monkeypatch.setattr(import_command, "write_sharded", nudged)
        with pytest.raises(UserError, match=r"NOT imported: .*'transformer.norm_f.weight'"):
            import_weights(run.folder, tmp_path / "there")
        assert not (tmp_path / "there").exists()
        assert not list(tmp_path.glob(".there*"))

    def test_a_full_disk_is_one_message(self, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run.save()

        def full(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(import_command, "write_sharded", full)
        with pytest.raises(UserError, match=r"there: cannot be written: .*No space left.*GB free there"):
            import_weights(run.folder, tmp_path / "there")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(UserError, match=r"needs 0\.00 GB, and 0\.00 GB are free"):
            import_weights(run.folder, tmp_path / "there")
        assert not list(tmp_path.glob(".there*"))

    def test_options(self, run, tmp_path: Path) -> None:
        run.save()
        with pytest.raises(UserError, match="--to both: use one of sharded, full"):
            import_weights(run.folder, tmp_path / "there", to="both")
        for size in ("5 apples", "0", "-3GB"):
            with pytest.raises(UserError, match="--max-shard-size"):
                export(run.folder, tmp_path / "there", max_shard_size=size)
        with pytest.raises(UserError, match="--weights-format npz: use one of safetensors, bin"):
            export(run.folder, tmp_path / "there", weights_format="npz")


def test_a_llama_that_we_exported_comes_back(run, tmp_path: Path) -> None:
    llama = {
        "attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "rope": True, "rope_impl": "hf"},
        "ffn_config": {"ffn_type": "mptglu", "ffn_hidden_size": 96, "ffn_act_fn": {"name": "silu"}},
        "norm_type": "rmsnorm",
        "tie_word_embeddings": False,
    }
    _, weights = run.save(**llama)
    report = export(run.folder, tmp_path / "llama", max_shard_size="30KB")
    assert report.layout == "llama"
    import_weights(tmp_path / "llama", tmp_path / "there")
    opened = open_source(tmp_path / "there")
    assert same(opened.weights, weights)
    assert (opened.config.kv_heads, opened.config.attn_config.rope) == (2, True)


class TestCommand:
    def call(self, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["llmtrain", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    def test_import_and_export(self, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
        _, weights = run.save()
        assert self.call(monkeypatch, "import", run.folder, tmp_path / "there", "--to", "full") == 0
        said = capsys.readouterr().out
        assert f"Imported {run.folder}" in said
        assert f"all {len(weights)} tensors bitwise equal" in said
        options = ("--dtype", "bf16", "--weights-format", "bin", "--max-shard-size", "30KB", "--license", "mit")
        assert self.call(monkeypatch, "export", tmp_path / "there", tmp_path / "out", *options) == 0
        assert len(list((tmp_path / "out").glob("pytorch_model-*.bin"))) > 1
        assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
        assert same(open_source(tmp_path / "out").weights, {n: v.bfloat16() for n, v in weights.items()})

    def test_a_failure_says_so_and_leaves_nothing(
        self, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
    ) -> None:
        path, _ = run.save()
        file = path / "__0_0.distcp"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        for verb in ("import", "export"):
            assert self.call(monkeypatch, verb, path, tmp_path / "out") == 2
            assert "__0_0.distcp: hash differs" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))


def test_the_folder_that_we_are_in_is_refused_before_the_work(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="is the folder that you are in"):
        import_weights(run.folder, Path())
