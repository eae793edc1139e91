"""`llmtrain eval` from end to end, in milliseconds: a checkpoint of random weights on real shards."""

import csv
import io
import json
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from llmtrain.errors import UserError
from llmtrain.evaluation.command import eval_command
from llmtrain.evaluation.evaluate import n_targets
from llmtrain.evaluation.ranks import Ranks
from llmtrain.evaluation.results import TaskResults
from llmtrain.evaluation.sharded import load_model
from llmtrain.evaluation.source import find
from llmtrain.evaluation.tokens import ShardTokens, folder_of_shards
from llmtrain.model.mpt import MPT
from llmtrain.prep.config import PrepRecipe
from llmtrain.prep.run import run as prepare
from llmtrain.recipe.load import load_recipe
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.tokenizer import with_chat_template


@pytest.fixture
def run(corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder with a checkpoint, as another trainer leaves it, and with the run's recipe."""
    monkeypatch.chdir(tmp_path)
    model = {"name": "mpt_causal_lm", "d_model": 48, "n_heads": 3, "n_layers": 2, "vocab_size": 515, "no_bias": True}
    recipe = tiny_recipe(tmp_path / "x.yaml", corpus, model={**model, "attn_config": {"alibi": True}})
    folder = tmp_path / "runs" / "x"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe.read_text())
    torch.manual_seed(0)
    model = MPT(load_recipe(recipe).model)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state": {"model": state}}, folder / "checkpoints" / "ep0-ba5.pt")
    return folder / "checkpoints" / "ep0-ba5.pt"


def evaluate(source: Path, *overrides: str, **settings) -> tuple[dict, str]:
    console = Console(file=io.StringIO(), width=200)
    return eval_command(source, overrides, console=console, **settings), console.file.getvalue()


def test_two_lengths_of_the_same_tokens(run: Path, corpus: TinyCorpus) -> None:
    found, said = evaluate(run, lengths=[128, 64], max_tokens=1000)
    assert found["source"] == "x/ep0-ba5.pt"
    assert [(at["max_seq_len"], at["targets"]) for at in found["lengths"]] == [(64, 999), (128, 999)]
    assert all(5.5 < at["loss"] < 7.5 for at in found["lengths"])  # it knows nothing yet
    assert "note: 128 tokens: beyond the 64 of training; ALiBi extrapolates" in said
    stem = run.parent.parent / "eval" / "ep0-ba5"
    assert json.loads(stem.with_suffix(".json").read_text()) == found
    rows = list(csv.DictReader(stem.with_suffix(".csv").open()))
    assert sum(int(row["targets"]) for row in rows if row["max_seq_len"] == "128") == 999
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_recipe_says_the_length_and_the_data(run: Path, corpus: TinyCorpus, tmp_path: Path) -> None:
    """And any way to name a run gives the same numbers."""
    overrides = ("max_seq_len=96", f"eval_loader.dataset.local={corpus.train}")
    wanted, _ = evaluate(run, *overrides, max_tokens=500, output=tmp_path / "a")
    assert [at["max_seq_len"] for at in wanted["lengths"]] == [96]
    given, _ = evaluate(run, lengths=[96], data=[corpus.train], max_tokens=500, output=tmp_path / "b")
    assert given["lengths"][0]["by_position"] == wanted["lengths"][0]["by_position"]
    assert {path.name for path in tmp_path.iterdir()} >= {"a.json", "a.csv", "a.png", "b.json", "b.csv", "b.png"}


def test_rows_of_a_stream_go_on_in_the_next(corpus: TinyCorpus) -> None:
    tokens = ShardTokens(folder_of_shards(corpus.val.parent), vocab_size=512, fingerprints=None, key="--data")
    assert len(tokens.pieces) == 1
    whole = tokens.read(0, 0, tokens.pieces[0])
    assert whole.tolist()[60:200] == tokens.read(0, 60, 200).tolist()
    assert (whole == corpus.eos_token_id).sum() > 1


def test_rows_of_one_document_each_are_not_joined(run: Path, corpus: TinyCorpus, tmp_path: Path) -> None:
    recipe = {
        "out": str(tmp_path / "long"),
        "max_seq_len": 128,
        "cut": "documents",
        "tokenizer": {"name": str(corpus.tokenizer)},
        "sources": [{"name": "a", "files": ["{stdlib}/this.py", "{stdlib}/abc.py"]}],
    }
    prepare(PrepRecipe.model_validate(recipe), Console(file=io.StringIO()))
    shards = tmp_path / "long" / "train"
    tokens = ShardTokens(folder_of_shards(shards), vocab_size=512, fingerprints=None, key="--data")
    assert set(tokens.pieces) == {128}
    found, _ = evaluate(run, data=[shards], lengths=[64, 128])
    assert [at["targets"] for at in found["lengths"]] == [n_targets(tokens.pieces)] * 2
    with pytest.raises(UserError, match=r"max_seq_len 256: .*of one document each"):
        evaluate(run, data=[shards], lengths=[256])


def recipe_of_two(folder: Path, run: Path, corpus: TinyCorpus, **changes) -> Path:
    """A recipe of the run and of another checkpoint of it, on shards, text and answers."""
    answers = [{"messages": [{"role": "user", "content": "if?"}, {"role": "assistant", "content": "while " * n}]}
               for n in (1, 5, 3)]  # fmt: skip
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    (folder / "notes.txt").write_text("The with statement is used to wrap the execution of a block. " * 9)
    other = run.with_name("ep0-ba6.pt")
    state = torch.load(run, weights_only=True)
    torch.save({"state": {"model": {name: value * 1.2 for name, value in state["state"]["model"].items()}}}, other)
    content = {
        "models": [{"load_path": str(run)}, {"model_name": "larger", "load_path": str(other)}],
        "max_seq_len": 64,
        "device_eval_batch_size": 3,
        "eval_loader": [
            {"label": "shards", "name": "text", "dataset": {"local": str(corpus.val)}},
            {"label": "notes", "name": "text_files", "files": str(folder / "notes.txt")},
            {
                "label": "chat",
                "name": "finetuning",
                "dataset": {"hf_name": "json", "hf_kwargs": {"data_files": str(folder / "chat.jsonl")},
                            "split": "train", "cache_dir": str(folder / "cache")},
            },
        ],
        "eval_subset_num_batches": 2,
        **changes,
    }  # fmt: skip
    path = folder / "both.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_an_evaluation_recipe(run: Path, corpus: TinyCorpus, tmp_path: Path) -> None:
    """Two models on shards, on text and on answers: each a line, and a subset of as many windows for both."""
    path = recipe_of_two(tmp_path, run, corpus)
    found, said = evaluate(path)
    first, second = found["models"]
    assert [one["source"] for one in (first, second)] == ["x/ep0-ba5.pt", "larger"]
    for one in (first, second):
        assert [(at["label"], at["kind"]) for at in one["lengths"]] == [
            ("shards", "text"), ("notes", "text"), ("chat", "answers")
        ]  # fmt: skip
        assert one["lengths"][0]["targets"] == 6 * 63
        assert "bits_per_byte" in one["lengths"][0]
        assert "bits_per_byte" not in one["lengths"][2]
    assert [a["loss"] != b["loss"] for a, b in zip(first["lengths"], second["lengths"], strict=True)] == [True] * 3
    assert first["lengths"][1]["bytes"] == second["lengths"][1]["bytes"]
    assert found["recipe"]["eval_subset_num_batches"] == 2
    assert json.loads((tmp_path / "eval" / "both.json").read_text()) == found
    assert "larger" in said
    # One of them alone: beside its checkpoint, under the recipe's name too.
    alone, _ = evaluate(path, f"models=[{{load_path: {run}}}]", "eval_loader=[{name: text_files, files: notes.txt}]")
    assert alone["lengths"][0]["loss"] == pytest.approx(first["lengths"][1]["loss"], rel=1e-6)
    assert (run.parent.parent / "eval" / "ep0-ba5-both.json").is_file()


def test_the_loss_of_answers_is_that_of_their_tokens(run: Path, corpus: TinyCorpus, tmp_path: Path) -> None:
    """Row by row, as the loader of training masks them."""
    path = recipe_of_two(tmp_path, run, corpus)
    found, _ = evaluate(path, f"models=[{{load_path: {run}}}]")
    place = find(run)
    model, tokenizer = load_model(place, Ranks())
    tokenizer = with_chat_template(tokenizer)
    total = n = 0
    for line in (tmp_path / "chat.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        ids = torch.tensor([tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)])
        prompt = tokenizer.apply_chat_template(
            messages[:1], tokenize=True, return_dict=False, add_generation_prompt=True
        )
        labels = ids.clone()
        labels[0, : len(prompt)] = -100
        end = int((ids[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")).nonzero().max())
        labels[0, end + 1 :] = -100
        with torch.no_grad():
            out = model(ids, labels=labels)
        total, n = total + float(out.loss_sum), n + int(out.n_targets)
    chat = found["lengths"][2]
    assert chat["targets"] == n
    assert chat["loss"] == pytest.approx(total / n, rel=1e-6)


def test_weights_that_say_nothing_are_what_the_recipe_says(run: Path, corpus: TinyCorpus, tmp_path: Path) -> None:
    """As llm-foundry's checkpoints are: a file, and model and tokenizer in the recipe."""
    wanted, _ = evaluate(run, max_tokens=500)
    alone = tmp_path / "elsewhere" / "ep0-ba5.pt"
    alone.parent.mkdir()
    alone.write_bytes(run.read_bytes())
    content = {
        "load_path": str(alone),
        "model": yaml.safe_load((tmp_path / "x.yaml").read_text())["model"],
        "tokenizer": {"name": str(corpus.tokenizer)},
        "max_seq_len": 64,
        "max_tokens": 500,
        "eval_loader": {"name": "text", "dataset": {"local": str(corpus.val)}},
    }
    (tmp_path / "foreign.yaml").write_text(yaml.safe_dump(content))
    found, _ = evaluate(tmp_path / "foreign.yaml")
    assert found["lengths"][0]["loss"] == wanted["lengths"][0]["loss"]
    with pytest.raises(UserError, match="no tokenizer is known"):
        evaluate(tmp_path / "foreign.yaml", "tokenizer=null")


def test_tasks(run: Path, repository: Path, tmp_path: Path) -> None:
    """llmtrain eval CHECKPOINT --tasks: no losses then, but where data is given as well."""
    tasks = str(repository / "yamls" / "eval" / "icl" / "tasks.yaml")
    found, said = evaluate(run, tasks=[tasks], num_fewshot=1)
    assert found["lengths"] == []
    assert {task["num_fewshot"] for task in found["tasks"]} == {1}
    assert "pronouns" in said
    assert not (run.parent.parent / "eval" / "ep0-ba5.csv").exists()
    (tmp_path / "a.txt").write_text("import os")
    both, _ = evaluate(run, tasks=[tasks], num_fewshot=1, data=[tmp_path / "a.txt"])
    assert both["tasks"] == found["tasks"]
    assert both["lengths"][0]["bytes"] == 9


@pytest.mark.parametrize(("lengths", "expected"), [([], 64), ([48], 48)])
def test_tasks_are_put_at_the_length_that_the_model_was_made_for(
    run: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, lengths: list[int], expected: int
) -> None:
    seen = []

    def noting(model, tokenizer, cfg, *arguments, **settings) -> TaskResults:
        seen.append(cfg.icl_seq_len)
        return TaskResults()

    monkeypatch.setattr("llmtrain.evaluation.icl.run.run_icl", noting)
    evaluate(run, tasks=[str(repository / "yamls" / "eval" / "icl" / "tasks.yaml")], lengths=lengths)
    assert seen == [expected]


def test_what_is_known_stays_when_the_next_model_fails(run: Path, corpus: TinyCorpus, tmp_path: Path) -> None:
    path = recipe_of_two(
        tmp_path, run, corpus, eval_loader={"name": "text_files", "files": str(tmp_path / "notes.txt")}
    )
    run.with_name("ep0-ba6.pt").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"ep0-ba6\.pt"):
        evaluate(path, "eval_subset_num_batches=1")
    (only,) = json.loads((tmp_path / "eval" / "both.json").read_text())["models"]
    assert only["source"] == "x/ep0-ba5.pt"
    assert only["lengths"][0]["loss"] > 0


def test_a_place_without_room_for_results_is_refused_first(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("import os")
    with pytest.raises(UserError, match=r"a\.txt/b: cannot be written"):
        evaluate(run, data=[tmp_path / "a.txt"], output=tmp_path / "a.txt" / "b")


def test_mistakes_of_recipes_and_tasks(
    run: Path, corpus: TinyCorpus, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_of_two(tmp_path, run, corpus)
    with pytest.raises(UserError, match=r"models\.0\.load_path: runs/y: no such file or folder"):
        evaluate(path, "models=[{load_path: runs/y}]")
    with pytest.raises(UserError, match=r"`tokenizer` .* is not the one of these weights"):
        evaluate(path, f"models=[{{load_path: {run}, tokenizer: {{name: {tokenizer}}}}}]")
    with pytest.raises(UserError, match=r"the recipe describes another model: model\.attn_config\.alibi"):
        evaluate(path, f"models=[{{load_path: {run}, model: {{attn_config: {{alibi: false}}}}}}]")
    with pytest.raises(UserError, match=r"--num-fewshot and --limit are for tasks"):
        evaluate(run, limit=3)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"empty\.txt: no text in it"):
        evaluate(run, data=[tmp_path / "empty.txt"])
    monkeypatch.setattr("llmtrain.evaluation.command.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'llmtrain\[eval\]'"):
        evaluate(run, tasks=["hellaswag"])


def test_mistakes_are_named(run: Path, corpus: TinyCorpus, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"optimizer\.lr=1: has no effect on an evaluation"):
        find(run, overrides=["optimizer.lr=1"])
    with pytest.raises(UserError, match="no such file or folder"):
        find(tmp_path / "nothing")
    with pytest.raises(UserError, match="there is no runs/y yet"):
        find(tmp_path / "x.yaml", overrides=["run_name=y"])
    with pytest.raises(UserError, match=r"--data .*nowhere: there is no folder"):
        evaluate(run, data=[tmp_path / "nowhere"])
    with pytest.raises(UserError, match="batch_tokens 0: must be at least 1"):
        evaluate(run, batch_tokens=0)
    with pytest.raises(UserError, match="max_tokens 1: must be at least 2"):
        evaluate(run, max_tokens=1)
    with pytest.raises(UserError, match="device cuda:99: torch sees"):
        evaluate(run, device="cuda:99")
    with pytest.raises(UserError, match="device graphics: no such device"):
        evaluate(run, device="graphics")
    said = io.StringIO()
    with pytest.raises(UserError, match=r"max_seq_len 999,999: the longest text"):
        eval_command(run, lengths=[64, 999_999], console=Console(file=said), output=tmp_path / "late")
    assert "tokens/s" not in said.getvalue()
    assert not list(tmp_path.glob("late*"))  # refused before anything is computed
    index = json.loads((corpus.val / "index.json").read_text())
    index["llmtrain"]["tokenizer_fingerprint"] = "0" * 64
    other = tmp_path / "other"
    other.mkdir()
    for file in corpus.val.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="made with another tokenizer"):
        evaluate(run, data=[other])


def test_each_stream_of_a_mixture_is_a_line_of_its_own(run: Path, corpus: TinyCorpus) -> None:
    streams = {"small": {"local": str(corpus.val)}, "large": {"local": str(corpus.train), "choose": 3}}
    dataset = json.dumps({"local": None, "streams": streams})
    mixed, said = evaluate(run, f"eval_loader.dataset={dataset}", max_tokens=20_000)
    (at,) = mixed["lengths"]
    small, _ = evaluate(run, data=[corpus.val])
    assert at["by_source"]["small"] == {
        "loss": pytest.approx(small["lengths"][0]["loss"], rel=1e-6),
        "targets": small["lengths"][0]["targets"],
        "bits_per_byte": pytest.approx(small["lengths"][0]["bits_per_byte"], rel=1e-6),
    }
    sums = [source["loss"] * source["targets"] for source in at["by_source"].values()]
    assert sum(sums) / at["targets"] == pytest.approx(at["loss"], rel=1e-6)
    assert sum(source["targets"] for source in at["by_source"].values()) == at["targets"]
    assert "small" in said
    assert "by_source" not in small["lengths"][0]
