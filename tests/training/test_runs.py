"""Real runs on gloo ranks: sharding strategies, full checkpoints, loggers and callbacks, mistakes before step 1."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llmtrain.checkpoint.export import export
from llmtrain.testing.corpus import TinyCorpus, tiny_corpus
from llmtrain.testing.launch import launch, launcher_environment
from llmtrain.testing.ranks import run_ranks
from llmtrain.testing.recipe import tiny_recipe

pytestmark = [pytest.mark.slow, pytest.mark.gloo_training]

LOSS = "loss/train/total"

PLAIN: dict[str, Any] = {
    "name": "mpt_causal_lm",
    "init_device": "mixed",
    "d_model": 48,
    "n_heads": 3,
    "n_layers": 2,
    "no_bias": True,
    "attn_config": {"alibi": True},
}
"""Without dropout, whose random numbers differ from rank to rank."""

STRATEGIES: dict[str, dict[str, Any] | None] = {
    "full": {"sharding_strategy": "FULL_SHARD"},
    "grad-op": {"sharding_strategy": "SHARD_GRAD_OP"},
    "hybrid": {"sharding_strategy": "HYBRID_SHARD", "data_parallel_replicate_degree": 2},
    "checkpointed": {"sharding_strategy": "FULL_SHARD", "activation_checkpointing": True},
    "ddp": {"sharding_strategy": "NO_SHARD"},
    "none": None,
}


def plain(corpus: TinyCorpus, **changes: Any) -> dict[str, Any]:
    return {**PLAIN, "vocab_size": corpus.vocab_size, **changes}


def sharding_of(recipe: str, cwd: str) -> dict[str, Any]:
    """What FSDP2 really did with the model on this rank."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    from llmtrain.recipe.load import load_recipe
    from llmtrain.training import environment, resume
    from llmtrain.training.train import assemble

    os.chdir(cwd)
    loaded = load_recipe(recipe)
    trainer = assemble(loaded, resume.StartingPoint(), environment.start(loaded))
    model = trainer.state.model
    weight = next(p for name, p in model.named_parameters() if name.endswith("transformer.wte.weight"))
    blocks = [m for m in model.modules() if isinstance(m, FSDPModule)]
    groups = [m._get_fsdp_state()._fsdp_param_group for m in blocks[1:]]
    return {
        "units": len(blocks),
        "mesh": tuple(weight.device_mesh.shape) if isinstance(weight, DTensor) else None,
        "placements": str(weight.placements) if isinstance(weight, DTensor) else None,
        "local": tuple(weight.to_local().shape) if isinstance(weight, DTensor) else tuple(weight.shape),
        "frees_after_forward": {group.post_forward_mesh_info is not None for group in groups if group is not None},
        "world": dist.get_world_size(),
    }


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy_really_shards_as_it_says(name: str, corpus: TinyCorpus, tmp_path: Path) -> None:
    changes = {"fsdp_config": STRATEGIES[name], "save_folder": None}
    recipe = tiny_recipe(tmp_path / f"{name}.yaml", corpus, model=plain(corpus), **changes)
    found = run_ranks(sharding_of, 4, str(recipe), str(tmp_path))
    rows, width = corpus.vocab_size, 48
    expected = {
        "full": (3, (4,), (rows // 4, width), {True}),
        "grad-op": (3, (4,), (rows // 4, width), {False}),
        "hybrid": (3, (2, 2), (rows // 2, width), {True}),
        "checkpointed": (3, (4,), (rows // 4, width), {True}),
        "ddp": (0, None, (rows, width), set()),
        "none": (0, None, (rows, width), set()),
    }[name]
    for rank in found:
        assert (rank["units"], rank["mesh"], rank["local"], rank["frees_after_forward"]) == expected


@pytest.mark.parametrize(
    "names", [("full", "hybrid", "ddp"), pytest.param(tuple(STRATEGIES), marks=pytest.mark.long)], ids=["some", "all"]
)
def test_strategies_and_numbers_of_ranks_train_the_same(
    corpus: TinyCorpus, tmp_path: Path, names: tuple[str, ...]
) -> None:
    losses = {}
    for name in names:
        recipe = tiny_recipe(
            tmp_path / f"{name}.yaml",
            corpus,
            model=plain(corpus),
            fsdp_config=STRATEGIES[name],
            max_duration="4ba",
            eval_loader=None,
            save_interval="2ba",
        )
        run = launch(recipe, ranks=4, cwd=tmp_path)
        assert run.code == 0, run.output
        losses[name] = list(run.metrics(LOSS).values())
        kind = json.loads((run.folder / "checkpoints/ep0-ba4/manifest.json").read_text())["kind"]
        assert kind == ("full" if name in ("ddp", "none") else "sharded")
        # The export proves by itself that the checkpoint's weights are the model.
        assert export(run.folder, run.folder / "export").tokens > 0
    for name, values in losses.items():
        assert len(values) == 4
        assert values == pytest.approx(losses["full"], rel=1e-5), name
    single = launch(
        tiny_recipe(tmp_path / "single.yaml", corpus, model=plain(corpus), max_duration="4ba"), cwd=tmp_path
    )
    assert list(single.metrics(LOSS).values()) == pytest.approx(losses["full"], rel=1e-5), single.output


@pytest.mark.parametrize("rank0_only", [pytest.param(False, marks=pytest.mark.long), True])
def test_full_checkpoints_of_a_sharded_run_resume_bit_for_bit(
    rank0_only: bool, corpus: TinyCorpus, tmp_path: Path
) -> None:
    fsdp = {"sharding_strategy": "FULL_SHARD", "state_dict_type": "full", "load_monolith_rank0_only": rank0_only}
    recipe = tiny_recipe(tmp_path / "full.yaml", corpus, fsdp_config=fsdp, max_duration="6ba", save_interval="3ba")
    whole = launch(recipe, ["run_name=whole"], ranks=2, cwd=tmp_path)
    assert whole.code == 0, whole.output
    assert (whole.folder / "checkpoints/ep0-ba6/full.pt").exists()
    again = launch(recipe, ["run_name=again", "max_duration=3ba", "scheduler.t_max=6ba"], ranks=2, cwd=tmp_path)
    assert again.code == 0, again.output
    again = launch(recipe, ["run_name=again"], ranks=2, cwd=tmp_path)
    assert again.code == 0, again.output
    assert "continues after step 3" in again.output
    assert whole.metrics(LOSS) == again.metrics(LOSS)


@pytest.mark.long
def test_weights_of_another_run_start_a_new_one(corpus: TinyCorpus, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "base.yaml", corpus, model=plain(corpus), eval_subset_num_batches=-1)
    base = launch(recipe, ranks=2, cwd=tmp_path)
    tuned = launch(
        recipe,
        ["run_name=tuned", "load_path=runs/base", "load_weights_only=true", "eval_first=true"],
        ranks=1,
        cwd=tmp_path,
    )
    assert tuned.code == 0, tuned.output
    key = "metrics/eval/LanguageCrossEntropy"
    assert tuned.metrics(key)[0] == pytest.approx(base.metrics(key)[12], rel=1e-6)
    missing = launch(recipe, ["run_name=lost", "load_path=runs/nowhere"], cwd=tmp_path)
    assert missing.code == 2
    assert "runs/nowhere: no such file or folder" in missing.output


def test_every_logger_and_callback_in_one_sharded_run(corpus: TinyCorpus, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tmp_path / "all.yaml",
        corpus,
        eval_loader=None,
        loggers={"wandb": {"project": "test"}, "tensorboard": {}, "mlflow": {}, "inmemory": {}, "file_logger": {}},
        callbacks={
            "speed_monitor": {"window_size": 2},
            "lr_monitor": {},
            "memory_monitor": {},
            "runtime_estimator": {},
            "optimizer_monitor": {"log_optimizer_metrics": True, "batch_log_interval": 1},
            "nan_monitor": {},
            "scheduled_gc": {"batch_interval": 2},
        },
        metadata={"purpose": "test"},
        precision="amp_bf16",
    )
    run = launch(recipe, ranks=2, cwd=tmp_path)
    assert run.code == 0, run.output
    assert "amp_bf16 needs a GPU; this run is on CPU and trains in fp32" in run.output
    assert list(tmp_path.rglob("*.wandb"))
    assert list(tmp_path.rglob("events.out.tfevents*"))
    assert list(tmp_path.rglob("mlflow.db"))
    norms = run.metrics("l2_norm/grad/global")
    assert len(norms) == 12
    assert all(0 < norm <= 1.0 + 1e-4 for norm in norms.values())  # clipped to 1
    assert run.metrics("throughput/tokens_per_sec")
    assert run.metrics("throughput/flops_per_sec")
    assert (run.folder / "loss.png").stat().st_size > 1000


@pytest.mark.long
def test_metrics_do_not_depend_on_batch_size_or_ranks(corpus: TinyCorpus, tmp_path: Path) -> None:
    names = ("LanguageCrossEntropy", "LanguagePerplexity", "TokenAccuracy")
    values = []
    for ranks, size in ((1, 1), (1, 5), (2, 1), (2, 4), (3, 1), (3, 7), (3, 1000)):  # at last, one short batch
        recipe = tiny_recipe(
            tmp_path / f"r{ranks}s{size}.yaml",
            corpus,
            model=plain(corpus),
            global_train_batch_size=6,
            max_duration="1ba",
            eval_subset_num_batches=-1,
            device_eval_batch_size=size,
            eval_first=True,
            save_folder=None,
        )
        run = launch(recipe, ranks=ranks, cwd=tmp_path)
        assert run.code == 0, run.output
        values.append([run.metrics(f"metrics/eval/{name}")[0] for name in names])
    for others in values[1:]:
        assert others == pytest.approx(values[0], rel=1e-6)


def test_the_wrong_tokenizer_is_an_error_before_the_first_step(corpus: TinyCorpus, tmp_path: Path) -> None:
    other = tiny_corpus(tmp_path / "other", vocab_size=400)
    recipe = tiny_recipe(tmp_path / "wrong.yaml", corpus, tokenizer={"name": str(other.tokenizer)})
    run = launch(recipe, ranks=2, cwd=tmp_path)
    assert run.codes == (2, 2), run.output
    assert "was made with another tokenizer" in run.output
    assert run.output.count("error:") == 1  # one rank speaks
    assert "Traceback" not in run.output


def test_missing_data_is_an_error_before_the_first_step(corpus: TinyCorpus, tmp_path: Path) -> None:
    loader = {"name": "text", "dataset": {"local": "no/such/folder"}, "num_workers": 0}
    run = launch(tiny_recipe(tmp_path / "lost.yaml", corpus, train_loader=loader), ranks=1, cwd=tmp_path)
    assert run.code == 2, run.output
    assert "no/such/folder" in run.output
    assert "Traceback" not in run.output


@pytest.mark.long  # launchers and ranks that import for themselves: the longest of these tests
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root to separate the nodes")
def test_two_nodes(corpus: TinyCorpus, tmp_path: Path) -> None:
    """The README's command for several nodes, with both nodes on this machine, each with shared memory of its own."""
    recipe = tiny_recipe(tmp_path / "nodes.yaml", corpus, max_duration="4ba")
    separate = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "node"]
    base = [*separate, sys.executable, "-m", "composer.cli.launcher", "-n", "1", "--world_size", "2"]
    script = ["-m", "llmtrain.training.command", str(recipe)]
    nodes = []
    for node in range(2):
        address = ["--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", "29517"]
        log = (tmp_path / f"node{node}.log").open("w")
        nodes.append(
            subprocess.Popen(
                [*base, *address, *script], cwd=tmp_path, env=launcher_environment(), stdout=log, stderr=log
            )
        )
    codes = [node.wait(timeout=900) for node in nodes]
    output = (tmp_path / "node0.log").read_text()
    assert codes == [0, 0], output + (tmp_path / "node1.log").read_text()
    assert "2 rank(s)" in output
    assert (tmp_path / "runs/nodes/checkpoints/ep0-ba4/__1_0.distcp").exists()
    assert torch.__version__ in output
