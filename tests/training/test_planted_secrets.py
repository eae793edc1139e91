"""Secrets are planted wherever a run may meet some; then everything that it leaves and prints is searched for them."""

from pathlib import Path

import pytest

from llmtrain.checkpoint.export import export
from llmtrain.evaluation.report import write_results
from llmtrain.recipe.check import check
from llmtrain.redaction import redact_text
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import launch
from llmtrain.testing.recipe import tiny_recipe

ENVIRONMENT = {
    "WANDB_API_KEY": "planted0wandb0000000000000000000000000000",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret/000000000000000000000",
    "HF_TOKEN": "hf_planted_token_0000000000000000",
    "MY_DATABASE_PASSWORD": "planted database password",
}
RECIPE = {
    "metadata": {
        "api_key": "planted-metadata-key",
        "note": f"the key is {ENVIRONMENT['AWS_SECRET_ACCESS_KEY']}",
        "place": "sftp://me:planted-url-password@host/data",
    },
    "variables": {"signed": "https://host/x?sig=planted-signature&a=1", "my": {"password": 12345678901234}},
    "loggers": {
        "wandb": {
            "project": "p",
            "init_kwargs": {"config": {"token": "planted-init-kwarg"}, "notes": "planted database password"},
        },
        "tensorboard": {},
        "file_logger": {},
    },
}  # fmt: skip
NEEDLES = [
    *ENVIRONMENT.values(), "planted-metadata-key", "planted-url-password", "planted-signature", "12345678901234",
    "planted-init-kwarg", "planted-override", "planted%2Faws",
]  # fmt: skip
FAILS = """
import os, logging
print("a library prints", os.environ["HF_TOKEN"])
logging.getLogger("llmtrain").error("a library logs %s", os.environ["MY_DATABASE_PASSWORD"])
if os.environ.get("RANK") == "0":
    raise RuntimeError("https://me:planted-url-password@host/ says no to " + os.environ["AWS_SECRET_ACCESS_KEY"])
"""


def leaks(text: bytes | str) -> list[str]:
    data = text.encode() if isinstance(text, str) else text
    return [needle for needle in NEEDLES if needle.encode() in data]


def searched(folder: Path) -> dict[str, list[str]]:
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    assert files
    return {str(file): found for file in files if (found := leaks(file.read_bytes()))}


@pytest.mark.slow
@pytest.mark.gloo_training
def test_no_planted_secret_is_ever_written_or_printed(
    corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(
        tmp_path / "run.yaml", corpus, max_duration="2ba", save_interval="1ba", eval_interval="2ba", **RECIPE
    )
    place = tmp_path / "place"
    place.mkdir()
    overrides = ["metadata.password=planted-override"]
    run = launch(recipe, overrides, ranks=2, cwd=place, environment=ENVIRONMENT)
    assert run.code == 0, run.output
    assert not leaks(run.output)
    again = launch(recipe, [*overrides, "max_duration=3ba"], ranks=2, cwd=place, environment=ENVIRONMENT)
    assert again.code == 0, again.output
    assert not leaks(again.output)
    assert "not as in ep0-ba2: metadata" not in again.output  # masked is not changed
    assert (run.folder / "wandb").is_dir()
    assert "***" in (run.folder / "recipe.yaml").read_text()

    code = tmp_path / "fails.py"
    code.write_text(FAILS)
    failed = launch(
        recipe, [*overrides, f"code_paths=[{code}]", "run_name=failed", "--trust-code"],
        ranks=2, cwd=place, environment=ENVIRONMENT,
    )  # fmt: skip
    assert failed.code == 1, failed.output
    assert "says no to ***" in failed.output
    assert "a library prints ***" in failed.output
    assert not leaks(failed.output)

    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    report = export(run.folder, run.folder / "export")
    text = check(recipe, overrides)
    write_results(tmp_path / "place" / "results", {"recipe": RECIPE, "source": RECIPE["metadata"]["place"]}, [])
    print(redact_text(str(report)), text)
    assert not leaks(capsys.readouterr().out)
    assert not searched(place)
