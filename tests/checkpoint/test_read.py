import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.read import read_weights
from llmtrain.checkpoint.sharded import ShardedTensors
from llmtrain.checkpoint.source import open_source
from llmtrain.errors import UserError

RECIPE = """
max_seq_len: 48
model:
  name: mpt_causal_lm
  d_model: 32
  n_heads: 4
  n_layers: 2
  vocab_size: 384
  no_bias: true
  attn_config: {alibi: true}
tokenizer: {name: EleutherAI/gpt-neox-20b}
train_loader: {name: text, dataset: {local: data, split: train}}
optimizer: {name: decoupled_adamw, lr: 1.0e-3}
scheduler: {name: constant_with_warmup, t_warmup: 2ba}
max_duration: 4ba
global_train_batch_size: 4
device_train_microbatch_size: 4
"""


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[n].dtype == wanted[n].dtype and torch.equal(found[n], wanted[n]) for n in wanted
    )


@pytest.mark.parametrize("kind", ["sharded", "full"])
@pytest.mark.parametrize("model", [{}, {"tie_word_embeddings": False}, {"no_bias": False, "attn_config": {}}])
def test_every_weight_comes_back(run, kind: str, model: dict) -> None:
    path, weights = run.save(kind=kind, **model)
    config, found = read_weights(path)
    assert same(found, weights)
    assert config.vocab_size == 384
    assert config.tie_word_embeddings == model.get("tie_word_embeddings", True)
    assert same(read_weights(run.folder)[1], weights)


def test_bfloat16_stays_bfloat16(run) -> None:
    path, weights = run.save(dtype=torch.bfloat16)
    assert same(read_weights(path)[1], weights)


def test_only_the_model_is_read(run) -> None:
    path, _ = run.save()
    names = list(ShardedTensors(path))
    assert any("exp_avg" in name for name in names)
    assert not any("exp_avg" in name for name in read_weights(path)[1])


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_flipped_bytes_are_refused_by_name(run, flip, kind: str) -> None:
    path, _ = run.save(kind=kind)
    file = next(f for f in path.iterdir() if f.suffix in (".distcp", ".pt"))
    flip(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=f"{file.name}: hash differs"):
        read_weights(path)


def test_a_run_falls_back_to_the_older_checkpoint_and_says_so(run, flip, caplog) -> None:
    _, older = run.save(step=3)
    newer, _ = run.save(step=6)
    flip(newer / ".metadata", 50)
    assert same(read_weights(run.folder)[1], older)
    assert "ep0-ba6 is refused: ep0-ba6/.metadata: hash differs" in caplog.text


def test_without_a_manifest_the_recipe_must_be_given(run, tmp_path: Path, caplog) -> None:
    path, _ = run.save(kind="full")
    alone = tmp_path / "elsewhere.pt"
    alone.write_bytes((path / "full.pt").read_bytes())
    with pytest.raises(UserError, match=r"--recipe yamls/x\.yaml"):
        read_weights(alone)
    assert "cannot be verified" in caplog.text


def test_a_recipe_given_or_beside_names_the_model(run, tmp_path: Path) -> None:
    path, weights = run.save(kind="full")
    alone = tmp_path / "other" / "checkpoints" / "llm-foundry.pt"
    alone.parent.mkdir(parents=True)
    alone.write_bytes((path / "full.pt").read_bytes())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    config, found = read_weights(alone, recipe=recipe)
    assert same(found, weights)
    assert config.max_seq_len == 48  # the recipe's one length knob
    (tmp_path / "other" / "recipe.yaml").write_text(RECIPE)
    assert same(read_weights(alone)[1], weights)


@pytest.mark.parametrize("give", [lambda path: path, lambda path: path.parent, lambda path: path.parents[1]])
def test_each_file_is_hashed_once(run, monkeypatch: pytest.MonkeyPatch, give) -> None:
    path, _ = run.save()
    hashed: list[str] = []
    real = manifest.file_entry
    monkeypatch.setattr(manifest, "file_entry", lambda file: hashed.append(file.name) or real(file))
    open_source(give(path))
    assert sorted(hashed) == [".metadata", "__0_0.distcp"]


def test_misfits_are_named(run) -> None:
    path, _ = run.save()
    block = {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64, "vocab_size": 512, "no_bias": True}
    run.seal(path, {**block, "attn_config": {"alibi": True}}, 3, "sharded")
    with pytest.raises(UserError) as error:
        read_weights(path)
    text = str(error.value)
    assert "missing: transformer.blocks.2.norm_1.weight" in text
    assert "transformer.wte.weight is [384, 32], the config says [512, 32]" in text
    run.seal(path, {**block, "n_layers": 1, "vocab_size": 384, "attn_config": {"alibi": True}}, 3, "sharded")
    with pytest.raises(UserError, match=r"not part of this model: transformer\.blocks\.1"):
        read_weights(path)


def test_names_under_wrappers(run) -> None:
    path, weights = run.save(kind="full")
    wrapped = {
        f"module.model._orig_mod.{n.replace('blocks.0.', 'blocks.0._checkpoint_wrapped_module.')}": v
        for n, v in weights.items()
    }
    torch.save({"state": {"model": wrapped}}, path / "full.pt")
    run.seal(path, run.PLAIN, 3, "full")
    assert same(read_weights(path)[1], weights)


def test_a_tied_head_is_dropped_only_if_it_is_tied(run) -> None:
    path, weights = run.save(kind="full")
    state = {f"model.{n}": v for n, v in weights.items()}
    state["model.lm_head.weight"] = weights["transformer.wte.weight"].clone()
    torch.save({"state": {"model": state}}, path / "full.pt")
    run.seal(path, run.PLAIN, 3, "full")
    assert same(read_weights(path)[1], weights)
    state["model.lm_head.weight"][5, 5] += 1
    torch.save({"state": {"model": state}}, path / "full.pt")
    run.seal(path, run.PLAIN, 3, "full")
    with pytest.raises(UserError, match="an lm_head of its own"):
        read_weights(path)


class TestMalice:
    def test_code_in_metadata_does_not_run(self, run, tmp_path: Path) -> None:
        path, _ = run.save()
        mark = tmp_path / "ran"
        (path / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
        run.seal(path, run.PLAIN, 3, "sharded")  # hashes do not help against an author
        with pytest.raises(UserError, match=r"names `(posix|nt)\.system`"):
            read_weights(path)
        assert not mark.exists()

    def test_getattr_in_metadata_reaches_enums_only(self, run, tmp_path: Path) -> None:
        path, _ = run.save()
        mark = tmp_path / "ran"
        # getattr(Metadata, "__init__").__globals__ would be a way to `os`; here it is refused at the first step.
        owner = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
        stream = b"\x80\x04cbuiltins\ngetattr\n(" + owner + b"X\x08\x00\x00\x00__init__tR."
        (path / ".metadata").write_bytes(stream)
        run.seal(path, run.PLAIN, 3, "sharded")
        with pytest.raises(UserError, match="no enum"):
            read_weights(path)
        assert not mark.exists()

    def test_code_in_a_full_checkpoint_does_not_run(self, run, tmp_path: Path) -> None:
        path, weights = run.save(kind="full")
        mark = tmp_path / "ran"
        state = {"state": {"model": {f"model.{n}": v for n, v in weights.items()}}, "extra": Evil(mark)}
        torch.save(state, path / "full.pt")
        run.seal(path, run.PLAIN, 3, "full")
        with pytest.raises(UserError, match=r"names `(posix|nt)\.system`"):
            read_weights(path)
        assert not mark.exists()

    def test_a_chunk_outside_the_folder_is_not_read(self, run, tmp_path: Path) -> None:
        path, _ = run.save()
        outside = tmp_path / "secret.distcp"
        outside.write_bytes((path / "__0_0.distcp").read_bytes())
        metadata = pickle.loads((path / ".metadata").read_bytes())
        for info in metadata.storage_data.values():
            info.relative_path = "../../../secret.distcp"
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
        run.seal(path, run.PLAIN, 3, "sharded")
        with pytest.raises(UserError, match="points outside the checkpoint"):
            read_weights(path)

    @pytest.mark.parametrize("content", [b"", b"\x80\x04garbage", b"PK\x03\x04 not a zip"])
    def test_garbage_is_one_message(self, run, content: bytes) -> None:
        sharded, _ = run.save(step=1)
        (sharded / ".metadata").write_bytes(content)
        run.seal(sharded, run.PLAIN, 1, "sharded")
        with pytest.raises(UserError, match="damaged"):
            read_weights(sharded)
        full, _ = run.save(step=2, kind="full")
        (full / "full.pt").write_bytes(content)
        run.seal(full, run.PLAIN, 2, "full")
        with pytest.raises(UserError, match=r"full\.pt: (cannot be read|refused)"):
            read_weights(full)


@pytest.mark.slow
def test_tensors_split_over_ranks_are_put_together(tmp_path: Path) -> None:
    """Real DTensors of two gloo ranks, one dimension not divisible by two."""
    script = textwrap.dedent(
        """
        import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor
        rank = int(sys.argv[1])
        dist.init_process_group("gloo", init_method="file://" + sys.argv[2] + "/meet", rank=rank, world_size=2)
        mesh = init_device_mesh("cpu", (2,))
        rows = distribute_tensor(torch.arange(35.0).view(7, 5), mesh, [Shard(0)])
        columns = distribute_tensor(torch.arange(12.0).view(3, 4), mesh, [Shard(1)])
        dcp.save({"rows": rows, "columns": columns, "plain": torch.ones(2)}, checkpoint_id=sys.argv[2] + "/dcp")
        os._exit(0)  # torch 2.7 now and then hangs when it takes gloo down
        """
    )
    ranks = [subprocess.Popen([sys.executable, "-c", script, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(timeout=600) for rank in ranks] == [0, 0]
    stored = ShardedTensors(tmp_path / "dcp")
    assert torch.equal(stored.read("rows"), torch.arange(35.0).view(7, 5))
    assert torch.equal(stored.read("columns"), torch.arange(12.0).view(3, 4))
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 2
    (tmp_path / "dcp" / "__1_0.distcp").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"__1_0\.distcp"):
        stored.read("rows")
