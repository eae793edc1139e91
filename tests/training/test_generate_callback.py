"""Samples during training: the same on one rank and on two, in every place, and without changing the run."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import Finished, launch
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.training.callbacks import CallbacksConfig
from llmtrain.training.generate_callback import GenerateCallback

SETTINGS = {"prompts": ["The", {"text": "def f"}], "max_new_tokens": 6, "temperature": 0.9}
LOSS = "loss/train/total"


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.gloo_training
def test_samples_of_a_sharded_run(corpus: TinyCorpus, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tmp_path / "x.yaml",
        corpus,
        callbacks={"generate_callback": SETTINGS, "loss_by_position": {}},
        loggers={"inmemory": {}},
        eval_first=True,
    )
    plain = launch(tiny_recipe(tmp_path / "plain.yaml", corpus, eval_first=True), ranks=2, cwd=tmp_path)
    whole = launch(recipe, ranks=2, cwd=tmp_path)
    assert (plain.code, whole.code) == (0, 0), whole.output
    assert whole.metrics(LOSS) == plain.metrics(LOSS)  # dropout included: no random state was touched
    taken = rows(whole.folder)
    assert [row["step"] for row in taken] == [0, 0, 5, 5, 10, 10, 12, 12]
    assert [row["prompt"] for row in taken[:2]] == ["The", "def f"]
    assert taken[0]["completion"] != taken[-2]["completion"]
    assert whole.output.count("sample      step 5  ") == 2
    # Ended at step 8 and continued, nothing stands there twice.
    cut = launch(recipe, ["run_name=cut", "max_duration=8ba"], ranks=1, cwd=tmp_path)
    assert [row["step"] for row in rows(cut.folder)] == [0, 0, 5, 5, 8, 8]
    again = launch(recipe, ["run_name=cut", "autoresume=true"], ranks=1, cwd=tmp_path)
    assert again.code == 0, again.output
    assert [row["step"] for row in rows(again.folder)] == [0, 0, 5, 5, 8, 8, 10, 10, 12, 12]
    losses_by_position_are_those_of_the_evaluations(whole, [0, 5, 10, 12])
    losses_by_position_are_those_of_the_evaluations(again, [0, 5, 8, 10, 12])


def positions(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "loss_by_position.json").read_text())


def losses_by_position_are_those_of_the_evaluations(run: Finished, steps: list[int]) -> None:
    taken, overall = positions(run.folder), run.metrics("metrics/eval/LanguageCrossEntropy")
    assert [row["step"] for row in taken] == steps
    for row in taken:
        assert row["loss"] == pytest.approx(overall[row["step"]], abs=1e-6)
        mean = sum(b["loss"] * b["targets"] for b in row["by_position"]) / row["targets"]
        assert mean == pytest.approx(row["loss"])
        assert row["by_position"][-1]["last"] == 63
    assert (run.folder / "loss_by_position.png").read_bytes().startswith(b"\x89PNG")
    assert list(run.metrics("loss_by_position/eval/1-63")) == steps


@pytest.mark.slow
@pytest.mark.gloo_training
def test_what_cannot_work_is_said_before_the_first_step(corpus: TinyCorpus, tmp_path: Path) -> None:
    talk = {"prompts": [[{"role": "user", "content": "x"}]]}
    for changes, message in (
        (
            {"callbacks": {"generate_callback": SETTINGS}, "eval_loader": None, "eval_interval": None},
            "this run has none",
        ),
        ({"callbacks": {"generate_callback": talk}}, "no chat template"),
    ):
        run = launch(tiny_recipe(tmp_path / "x.yaml", corpus, save_folder=None, **changes), ranks=1, cwd=tmp_path)
        assert run.code == 2
        assert message in run.output
        assert not (run.folder / "metrics.jsonl").exists()


class TestSettings:
    def config(self, **settings: Any) -> Any:
        return CallbacksConfig.model_validate({"generate_callback": {"prompts": ["x"], **settings}}).generate_callback

    @pytest.mark.parametrize(
        ("settings", "temperature"),
        [
            ({}, 0),
            ({"temperature": 0.7}, 0.7),
            ({"top_p": 0.9}, 1),
            ({"do_sample": True}, 1),
            ({"do_sample": False}, 0),
        ],
    )
    def test_chance_where_it_is_asked_for(self, settings: dict[str, Any], temperature: float) -> None:
        assert GenerateCallback(**self.config(**settings).model_dump()).sampling.temperature == temperature

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"prompts": []}, "prompts"),
            ({"prompts": [[]]}, "at least one turn"),
            ({"prompts": [[{"role": "bot", "content": "x"}]]}, "role"),
            ({"do_sample": False, "top_k": 5}, "takes no temperature"),
            ({"interval": "1 week"}, "number and a unit"),
            ({"max_length": 100}, "max_length"),
        ],
    )
    def test_nonsense_is_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            self.config(**settings)

    def test_plain_prompts_are_turns_where_conversations_are_trained(self, tmp_path: Path) -> None:
        turn = {"role": "user", "content": "y"}
        callback = GenerateCallback(["x", {"text": "z"}, [turn]])
        callback.attach(None, tmp_path, conversations=True)  # type: ignore[arg-type]
        assert callback.prompts == [[{"role": "user", "content": "x"}], "z", [turn]]
        callback.attach(None, tmp_path, conversations=False)  # type: ignore[arg-type]
        assert callback.prompts == ["x", "z", [turn]]
