"""What a user may do wrong, and where the runs go."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmtrain.certify.subject import subject, without_dropout
from llmtrain.certify.workspace import workspace
from llmtrain.errors import UserError
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.recipe import tiny_recipe
from tests.certify.conftest import Certify


def test_a_recipe_for_a_cluster_names_its_twin(certify: Certify, repository: Path) -> None:
    for name, twin in (("mpt-7b", "mpt-tiny.yaml"), ("mpt-7b-chat", "mpt-tiny-chat.yaml")):
        with pytest.raises(UserError, match=f"too many to be trained again and again.*yamls/{twin}"):
            certify(repository / f"yamls/{name}.yaml")


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (["max_duration=3ba"], {}, "max_duration: cannot be overridden here; give --steps"),
        (["run_name=x"], {}, "run_name: cannot be overridden"),
        ([], {"steps": 3}, "--steps 3: at least 6"),
        ([], {"other_ranks": "1,x"}, "--other-ranks 1,x: expected numbers"),
        ([], {"other_ranks": "0"}, "--other-ranks 0: expected numbers"),
        ([], {"output": Path("nowhere/x")}, "there is no folder"),
        (["nonsense=1"], {}, "nonsense"),
    ],
)
def test_mistakes(
    overrides: list[str],
    options: dict[str, Any],
    message: str,
    corpus: TinyCorpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from llmtrain.certify.command import certify_command

    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(tmp_path / "tiny.yaml", corpus)
    with pytest.raises(UserError, match=message):
        certify_command(recipe, overrides, **options)
    assert not list(tmp_path.glob("certificate*"))


def test_a_recipe_is_made_short_and_what_is_overridden_stays(corpus: TinyCorpus, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tmp_path / "tiny.yaml",
        corpus,
        max_duration="3ep",
        scheduler={"name": "inv_sqrt_with_warmup", "t_warmup": "1ep", "t_scale": "1ep", "t_cooldown": "1ep"},
        loggers={"wandb": {}},
    )
    made = subject(recipe, ["save_interval=7ba", "train_subset_num_batches=-1"], steps=24, ranks=2)
    assert made.data["max_duration"] == "24ba"
    assert made.data["save_interval"] == "7ba"
    assert made.data["train_subset_num_batches"] == -1
    assert made.data["eval_interval"] == "5ba"
    assert made.data["loggers"] is None
    assert made.data["scheduler"]["t_warmup"] == made.data["scheduler"]["t_scale"] == "4ba"
    assert "max_duration: 3ep -> 24ba" in made.changes
    assert made.dropouts == ("model.resid_pdrop",)
    assert made.elastic_problem is None
    assert without_dropout(made.data, made.dropouts)["model"]["resid_pdrop"] == 0.0
    assert made.data["model"]["resid_pdrop"] == 0.1
    by_device = {"local": str(corpus.train), "shuffle": True, "batching_method": "device_per_stream"}
    tiny_recipe(recipe, corpus, train_loader={"name": "text", "dataset": by_device})
    assert "device_per_stream" in str(subject(recipe, [], steps=24, ranks=2).elastic_problem)


def test_the_users_files_are_reached_and_the_users_runs_are_not_touched(tmp_path: Path) -> None:
    user = tmp_path / "user"
    (user / "runs/base/checkpoints").mkdir(parents=True)
    (user / "data").mkdir()
    (user / "data/x.txt").write_text("x")
    with workspace(user, keep=False) as place:
        assert (place.folder / "data/x.txt").read_text() == "x"
        assert (place.folder / "runs/base/checkpoints").is_dir()
        place.run("whole").mkdir()
        (place.run("whole") / "metrics.jsonl").touch()
        place.write_recipe("whole", {"seed": 1})
    assert not os.path.lexists(place.folder)
    assert sorted(str(path.relative_to(user)) for path in user.rglob("*")) == [
        *("data", "data/x.txt", "runs", "runs/base", "runs/base/checkpoints")
    ]
    with workspace(user, keep=True) as kept:
        pass
    assert kept.runs.is_dir()
    shutil.rmtree(kept.folder)


def test_paths_that_lead_out_of_the_working_directory_stay_what_they_are(
    corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "corpus").symlink_to(corpus.train.parent)
    monkeypatch.chdir(tmp_path / "work")
    loader = {"name": "text", "dataset": {"local": "../corpus/train"}}
    recipe = tiny_recipe(tmp_path / "tiny.yaml", corpus, train_loader=loader)
    made = subject(recipe, [], steps=24, ranks=1)
    assert made.data["train_loader"]["dataset"]["local"] == str(tmp_path / "corpus/train")
    assert not made.data["tokenizer"]["name"].startswith("..")
