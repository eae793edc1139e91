"""Where a run starts, what it keeps, and what it refuses: with real checkpoints."""

import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import Finished, Run, launch
from llmtrain.testing.recipe import tiny_recipe

pytestmark = [pytest.mark.slow]

LOSS = "loss/train/total"
EVAL = "metrics/eval/LanguageCrossEntropy"


def checkpoints(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").glob("ep*")}


def damage(checkpoint: Path) -> None:
    file = checkpoint / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.fixture(scope="module")
def recipe(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_recipe(tmp_path_factory.mktemp("starts") / "base.yaml", corpus, max_duration="6ba", save_interval="2ba")


@pytest.fixture(scope="module")
def base(recipe: Path) -> Finished:
    """Checkpoints at the steps 2, 4 and 6."""
    run = launch(recipe, cwd=recipe.parent)
    assert run.code == 0, run.output
    return run


def copy(base: Finished, name: str) -> Path:
    shutil.copytree(base.folder, base.folder.with_name(name), symlinks=True)
    return base.folder.with_name(name)


def go(recipe: Path, *overrides: str) -> Finished:
    return launch(recipe, overrides, cwd=recipe.parent)


def refused(run: Finished, *texts: str) -> None:
    assert run.code == 2, run.output
    assert "Traceback" not in run.output
    for text in texts:
        assert text in run.output, run.output


def test_retention_never_deletes_the_only_good_checkpoint(recipe: Path, base: Finished) -> None:
    run = copy(base, "kept")
    damage(run / "checkpoints/ep0-ba6")
    again = go(recipe, "run_name=kept", "save_num_checkpoints_to_keep=1", "save_interval=100ba", "max_duration=5ba")
    assert again.code == 0, again.output
    assert "continues after step 4" in again.output
    assert checkpoints(run) == {"ep0-ba5", "ep0-ba6"}  # the damaged one does not count, and is left for its owner
    once_more = go(recipe, "run_name=kept", "max_duration=5ba")
    assert "complete at step 5" in once_more.output, once_more.output


def test_keep_the_last_two(recipe: Path) -> None:
    run = go(recipe, "run_name=two", "save_num_checkpoints_to_keep=2", "save_interval=1ba")
    assert checkpoints(run.folder) == {"ep0-ba5", "ep0-ba6"}
    assert (run.folder / "checkpoints/latest").readlink() == Path("ep0-ba6")
    assert not list((run.folder / "checkpoints").glob(".*"))


def test_overwriting_keeps_the_old_checkpoints_until_a_new_one_is_complete(recipe: Path, base: Finished) -> None:
    run = copy(base, "over")
    refused(go(recipe, "run_name=over", "save_overwrite=true", "tokenizer.name=no/such/folder"), "no/such/folder")
    assert checkpoints(run) == {"ep0-ba2", "ep0-ba4", "ep0-ba6"}
    inside = f"load_path={run}/checkpoints/ep0-ba4"
    refused(go(recipe, "run_name=over", "save_overwrite=true", inside), "lies in save_folder")
    assert checkpoints(run) == {"ep0-ba2", "ep0-ba4", "ep0-ba6"}
    again = go(recipe, "run_name=over", "save_overwrite=true", "max_duration=3ba", "save_interval=100ba")
    assert again.code == 0, again.output
    assert checkpoints(run) == {"ep0-ba3"}
    assert list(again.metrics(LOSS)) == [0, 1, 2]


def test_the_last_step_of_an_epoch_is_saved_as_the_next_epoch(recipe: Path, corpus: TinyCorpus) -> None:
    """`ep9-ba20` sorted after `ep10-ba20`, and a finished run started over and over."""
    epochs = [
        "run_name=epochs",
        "max_duration=10ep",
        "train_subset_num_batches=2",
        "save_interval=2ba",
        "eval_interval=0",
    ]
    run = go(recipe, *epochs)
    assert run.code == 0, run.output
    assert "ep10-ba20" in checkpoints(run.folder)
    assert len(checkpoints(run.folder)) == 10  # one for each moment, not two at the end
    again = go(recipe, *epochs)
    assert "complete at step 20" in again.output, again.output


def test_weights_alone_can_start_a_run_but_not_continue_one(recipe: Path, base: Finished) -> None:
    run = go(recipe, "run_name=weights", "save_weights_only=true", "max_duration=4ba")
    assert run.code == 0, run.output
    finished = go(recipe, "run_name=weights", "save_weights_only=true", "max_duration=4ba")
    assert finished.code == 0, finished.output
    assert "complete at step 4" in finished.output
    refused(go(recipe, "run_name=weights", "save_weights_only=true"), "weights only", "save_overwrite=true")
    refused(go(recipe, "run_name=weights"), "holds weights only", "load_weights_only=true")
    source = f"load_path={run.folder}"
    refused(go(recipe, "run_name=more", source), "holds weights only. Set load_weights_only=true")
    more = go(recipe, "run_name=more", source, "load_weights_only=true", "max_duration=1ba")
    assert more.code == 0, more.output


def test_load_path_continues_another_run_and_says_where(recipe: Path, base: Finished) -> None:
    branch = go(recipe, "run_name=branch", f"load_path={base.folder}/checkpoints/ep0-ba4")
    assert branch.code == 0, branch.output
    assert "continues after step 4" in branch.output
    assert {step: base.metrics(LOSS)[step] for step in (4, 5)} == branch.metrics(LOSS)
    refused(go(recipe, "run_name=past", f"load_path={base.folder}"), "max_duration 6ba is reached")
    broken = copy(base, "broken")
    damage(broken / "checkpoints/ep0-ba4")
    refused(go(recipe, "run_name=b", f"load_path={broken}/checkpoints/ep0-ba4"), "is damaged", "hash differs")


@pytest.mark.long
def test_full_and_sharded_checkpoints_find_each_other(recipe: Path, base: Finished) -> None:
    full = ["fsdp_config.state_dict_type=full"]
    made = go(recipe, *full, "run_name=full")
    assert made.code == 0, made.output
    for override in full, ["fsdp_config.sharding_strategy=NO_SHARD"]:
        refused(
            go(recipe, *override, "run_name=x", f"load_path={base.folder}"), "reads full", "state_dict_type=sharded"
        )
    refused(go(recipe, "run_name=x", f"load_path={made.folder}"), "reads sharded", "state_dict_type=full")
    copy(base, "turned")
    refused(go(recipe, *full, "run_name=turned", "max_duration=9ba"), "reads full ones")
    first = ["max_duration=1ba", "eval_first=true", "load_weights_only=true", "eval_subset_num_batches=-1"]
    whole = go(recipe, *first, "run_name=a", f"load_path={base.folder}")
    from_full = go(recipe, *first, "run_name=b", f"load_path={made.folder}/checkpoints/ep0-ba6/full.pt")
    from_sharded = go(recipe, *first, *full, "run_name=c", f"load_path={base.folder}")
    for run in (whole, from_full, from_sharded):
        assert run.code == 0, run.output
        assert run.metrics(EVAL)[0] == whole.metrics(EVAL)[0]
        assert list(run.metrics(LOSS)) == [0]


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("model.attn_config.alibi_bias_max=16", "model.attn_config.alibi_bias_max 8.0 -> 16.0"),
        ("model.attn_config.alibi=false", "model.attn_config.alibi True -> False"),
        ("model.n_heads=4", "model.n_heads 3 -> 4"),
        ("model.norm_type=rmsnorm", "model.norm_type low_precision_layernorm -> rmsnorm"),
        ("optimizer.name=adamw", "optimizer.name was 'decoupled_adamw'"),
    ],
)
def test_what_would_make_it_another_model_is_refused(recipe: Path, base: Finished, override: str, text: str) -> None:
    refused(go(recipe, "max_duration=9ba", override), text)


def test_what_may_change_is_said(recipe: Path, base: Finished) -> None:
    copy(base, "longer")
    run = go(recipe, "run_name=longer", "max_duration=7ba", "optimizer.lr=0.02", "model.resid_pdrop=0.0")
    assert run.code == 0, run.output
    assert "optimizer.lr 0.01 -> 0.02" in run.output
    assert "max_duration 6ba -> 7ba" in run.output
    assert "schedule changes" in run.output


def test_sigterm_during_an_evaluation_does_not_wait_for_its_end(recipe: Path, corpus: TinyCorpus) -> None:
    long = ["run_name=long", "eval_subset_num_batches=-1", "eval_interval=2ba", "save_interval=100ba"]
    run = Run(recipe, [*long, "device_eval_batch_size=1"], ranks=1, cwd=recipe.parent)
    run.wait_for("step 2 ")  # the line stands before the evaluation of step 2 begins
    run.send(signal.SIGTERM)
    ended = run.wait()
    assert ended.codes == (143,), ended.output
    assert "SIGTERM: stopped after step 2" in ended.output
    assert "eval        step 2" not in ended.output
    again = go(recipe, *long)
    assert "continues after step 2" in again.output
    assert again.code == 0


def test_another_trainers_checkpoints_are_not_trained_over(recipe: Path) -> None:
    folder = recipe.parent / "runs/foreign/checkpoints"
    folder.mkdir(parents=True)
    (folder / "ep0-ba100-rank0.pt").write_bytes(b"llm-foundry's")
    refused(go(recipe, "run_name=foreign"), "another trainer's checkpoints", "load_path")


def test_an_unwritable_run_folder_is_one_message(recipe: Path) -> None:
    (recipe.parent / "runs").mkdir(exist_ok=True)
    (recipe.parent / "runs/taken").write_text("a file where the folder should be")
    refused(go(recipe, "run_name=taken"), "runs/taken")


@pytest.mark.gloo_training
def test_an_error_of_one_rank_is_named_with_its_rank(recipe: Path, corpus: TinyCorpus, tmp_path: Path) -> None:
    """A shard that only rank 1 reads is missing: rank 0 sees nothing but a lost connection."""
    from rich.console import Console

    from llmtrain.prep.config import PrepRecipe, PrepTokenizer, SourceConfig
    from llmtrain.prep.run import run as prepare

    source = SourceConfig(
        name="topics", files=["{stdlib}/pydoc_data/topics.py"], format="python_literals", max_bytes=60_000
    )
    tokenizer = PrepTokenizer(name=str(corpus.tokenizer))
    data = PrepRecipe(
        out=str(tmp_path / "data"), max_seq_len=64, tokenizer=tokenizer, sources=[source], size_limit=2048
    )
    prepare(data, Console(quiet=True))
    shards = sorted((tmp_path / "data/train").glob("shard.*"))
    assert len(shards) > 10
    shards[-1].unlink()  # unshuffled with two canonical nodes: the second half is rank 1's
    loader: dict[str, Any] = {
        "name": "text",
        "dataset": {"local": str(tmp_path / "data/train"), "shuffle": False, "num_canonical_nodes": 2},
        "num_workers": 0,
    }
    broken = tiny_recipe(
        tmp_path / "broken.yaml", corpus, train_loader=loader, max_duration="1ep", eval_loader=None, save_folder=None
    )
    run = launch(broken, ranks=2, cwd=tmp_path)
    assert 2 in run.codes, run.output
    named = re.escape(f"{tmp_path}/data/train: shard {shards[-1].name}")
    assert re.search(rf"error \(rank 1, after step \d+\): {named}", run.output), run.output


@pytest.mark.gloo_training
@pytest.mark.parametrize("how", ["pretrained", "load_path"])
def test_a_run_starts_from_the_weights_of_another_and_its_vocabulary_grows(
    recipe: Path, base: Finished, how: str
) -> None:
    """New rows are never predicted at first, so the first evaluation is nearly the last one of the base run."""
    source = {
        "pretrained": [f"model.pretrained={base.folder}"],
        "load_path": [f"load_path={base.folder}", "load_weights_only=true"],
    }[how]
    settings = [f"run_name=grown-{how}", "model.vocab_size=640", "max_duration=1ba", "eval_first=true"]
    settings += ["tokenizer.special_tokens=['<|im_start|>']", "eval_interval=100ba", "model.resid_pdrop=0"]
    run = launch(recipe, [*source, *settings], ranks=2, cwd=recipe.parent)
    assert run.code == 0, run.output
    first = run.metrics(EVAL)[0]
    assert abs(first - base.metrics(EVAL)[max(base.metrics(EVAL))]) < 0.15, run.output
    again = go(recipe, *source, *settings, "max_duration=2ba")
    assert again.code == 0, again.output
    assert "continues after step 1" in again.output  # its own checkpoint, not the starting point


def test_a_smaller_vocabulary_is_refused(recipe: Path, base: Finished) -> None:
    refused(
        go(recipe, f"model.pretrained={base.folder}", "model.vocab_size=384", "run_name=less"),
        "model.vocab_size",
        "512",
    )
