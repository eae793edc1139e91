import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console
from streaming import StreamingDataset
from transformers import AutoTokenizer

from llmtrain.config.load import load
from llmtrain.errors import UserError
from llmtrain.prep.config import PrepRecipe
from llmtrain.prep.run import load_recipe, prepare, run
from llmtrain.prep.split import is_validation
from llmtrain.tokenizer import fingerprint

ROOT = Path(__file__).parents[2]
SEQ = 32


@pytest.fixture
def docs(tmp_path):
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "x = 1", "\n", "def f():", "  return"]
    texts = [" ".join(rng.choice(words, rng.integers(1, 60))) for _ in range(300)]
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path, texts


def recipe(tmp_path, docs, **changes):
    base = {
        "out": str(tmp_path / "out"),
        "max_seq_len": SEQ,
        "val_fraction": 0.2,
        "tokenizer": {"train": {"vocab_size": 270}},
        "sources": [{"name": "docs", "files": [str(docs[0])]}],
    }
    return PrepRecipe.model_validate({**base, **changes})


def held_out(texts, fraction=0.2):
    """Whether each text is for validation: by where its line begins in the file."""
    lines = [len(json.dumps({"text": text})) + 1 for text in texts]
    places = np.cumsum([0, *lines[:-1]])
    return [is_validation("docs", f"docs.jsonl\0{place}", fraction) for place in places]


def make(made_recipe):
    console = Console(file=io.StringIO(), width=200)
    content = run(made_recipe, console)
    return content, console.file.getvalue()


def rows(folder):
    index = json.loads((folder / "index.json").read_text())
    assert index["shards"]
    dataset = StreamingDataset(local=str(folder), batch_size=1, num_canonical_nodes=1)
    return np.stack([dataset[i]["tokens"] for i in range(dataset.size)])


def digest(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_rows_are_the_documents_joined_with_eos_and_split(tmp_path, docs):
    content, _ = make(recipe(tmp_path, docs))
    out = tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    for split, wanted in (("train", False), ("val", True)):
        texts = [text for text, held in zip(docs[1], held_out(docs[1]), strict=True) if held == wanted]
        ids = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_token_id]]
        n = len(ids) // SEQ
        got = rows(out / split)
        assert got.dtype == np.uint16
        assert np.array_equal(got, np.array(ids[: n * SEQ]).reshape(n, SEQ))
        counts = content["splits"][split]
        assert counts["documents"] == len(texts)
        assert counts["tokens"] == len(ids)
        assert counts["samples"] == n
        assert counts["dropped_tokens"] == len(ids) - n * SEQ
        assert counts["bytes"] == sum(len(text.encode()) for text in texts)
        share = np.unique(got, return_counts=True)[1] / got.size
        assert counts["unigram_entropy_nats"] == pytest.approx(-(share * np.log(share)).sum())
    assert content == json.loads((out / "prep.json").read_text())
    assert content["tokenizer_fingerprint"] == fingerprint(str(out / "tokenizer"))
    assert content["eos_token_id"] == tokenizer.eos_token_id
    assert 30 < content["splits"]["val"]["documents"] < 90


def test_bos_no_eos_and_short_documents(tmp_path, docs):
    content, _ = make(recipe(tmp_path, docs, bos=True, eos=False, min_document_tokens=30))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    kept = [tokenizer.encode(text) for text, held in zip(docs[1], held_out(docs[1]), strict=True) if not held]
    long = [ids for ids in kept if len(ids) >= 30]
    ids = [token for document in long for token in [tokenizer.bos_token_id, *document]]
    got = rows(tmp_path / "out" / "train").reshape(-1)
    assert np.array_equal(got, ids[: len(got)])
    assert content["splits"]["train"]["dropped_documents"] == len(kept) - len(long) > 0


def test_same_inputs_same_bytes(tmp_path, docs):
    make(recipe(tmp_path, docs))
    make(recipe(tmp_path, docs, out=str(tmp_path / "again")))
    assert digest(tmp_path / "out") == digest(tmp_path / "again")
    assert len(digest(tmp_path / "out")) == 8


def test_second_run_does_nothing(tmp_path, docs):
    first, _ = make(recipe(tmp_path, docs))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again, said = make(recipe(tmp_path, docs, overwrite=True))
    assert again == first
    assert said.count("\n") == 1
    assert "nothing to do" in said
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_another_recipe_is_refused_unless_overwrite(tmp_path, docs):
    make(recipe(tmp_path, docs))
    before = digest(tmp_path / "out")
    with pytest.raises(UserError, match=r"changed since: max_seq_len, val_fraction.*overwrite=true"):
        make(recipe(tmp_path, docs, max_seq_len=16, val_fraction=0.1))
    assert digest(tmp_path / "out") == before
    make(recipe(tmp_path, docs, max_seq_len=16, overwrite=True))
    assert rows(tmp_path / "out" / "train").shape[1] == 16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["docs.jsonl", "out"]


def test_changed_files_are_noticed(tmp_path, docs):
    make(recipe(tmp_path, docs))
    with docs[0].open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(UserError, match="the files of docs"):
        make(recipe(tmp_path, docs))


def test_a_folder_of_somebody_else_is_never_touched(tmp_path, docs):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not made by"):
        make(recipe(tmp_path, docs, overwrite=True))
    assert (tmp_path / "out" / "thesis.txt").read_text() == "x"


def test_failure_leaves_nothing(tmp_path, docs):
    with docs[0].open("a") as file:
        file.write("{broken\n")
    with pytest.raises(UserError, match=r"docs\.jsonl, line 301"):
        make(recipe(tmp_path, docs))
    assert [path.name for path in tmp_path.iterdir()] == ["docs.jsonl"]


def test_empty_split_is_an_error(tmp_path, docs):
    with pytest.raises(UserError, match="val would be empty"):
        make(recipe(tmp_path, docs, val_fraction=1e-9))
    with pytest.raises(UserError, match="train would be empty"):
        make(recipe(tmp_path, docs, max_seq_len=10_000_000, val_fraction=0, size_limit=1 << 28))


def test_vocabulary_that_the_sample_cannot_fill(tmp_path, docs):
    with pytest.raises(UserError, match=r"vocab_size: the sample gave \d+ of 5000"):
        make(recipe(tmp_path, docs, tokenizer={"train": {"vocab_size": 5000}}))


def test_existing_tokenizer_and_one_folder_a_source(tmp_path, docs):
    make(recipe(tmp_path, docs))
    tokenizer = str(tmp_path / "out" / "tokenizer")
    sources = [
        {"name": "a", "files": [str(docs[0])], "proportion": 0.75},
        {"name": "b", "files": [str(docs[0])], "max_documents": 100, "proportion": 0.25},
    ]
    changes = {"out": str(tmp_path / "mix"), "tokenizer": {"name": tokenizer}, "sources": sources}
    content, said = make(recipe(tmp_path, docs, split_by_source=True, **changes))
    assert set(content["splits"]) == {"a/train", "a/val", "b/train", "b/val"}
    assert content["splits"]["a/train"]["documents"] + content["splits"]["a/val"]["documents"] == 300
    assert content["splits"]["b/train"]["documents"] + content["splits"]["b/val"]["documents"] == 100
    assert not (tmp_path / "mix" / "tokenizer").exists()
    snippet = yaml.safe_load(said[said.index("train_loader:") :])
    assert snippet["train_loader"]["dataset"]["streams"]["b"] == {
        "local": f"{tmp_path}/mix/b/train",
        "proportion": 0.25,
    }
    assert snippet["tokenizer"] == {"name": tokenizer}
    for stream in snippet["eval_loader"]["dataset"]["streams"].values():
        assert len(rows(Path(stream["local"])))


def test_loader_yaml_is_a_valid_loader(tmp_path, docs):
    from llmtrain.data.config import TextLoaderConfig

    _, said = make(recipe(tmp_path, docs))
    snippet = yaml.safe_load(said[said.index("train_loader:") :])
    train = TextLoaderConfig.model_validate(snippet["train_loader"])
    assert train.dataset.local == str(tmp_path / "out" / "train")
    assert TextLoaderConfig.model_validate(snippet["eval_loader"]).drop_last is False


def test_tokenizer_without_eos(tmp_path, docs):
    make(recipe(tmp_path, docs))
    (tmp_path / "out" / "tokenizer" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "out" / "tokenizer" / "special_tokens_map.json").write_text("{}")
    changes = {"out": str(tmp_path / "b"), "tokenizer": {"name": str(tmp_path / "out" / "tokenizer")}}
    with pytest.raises(UserError, match="no eos_token"):
        make(recipe(tmp_path, docs, **changes))


def test_killed_run_leaves_nothing_that_looks_complete_and_is_redone(tmp_path, docs):
    with docs[0].open("a") as file:
        for _ in range(40):
            file.write("".join(json.dumps({"text": text}) + "\n" for text in docs[1]))
    made_recipe = recipe(tmp_path, docs, size_limit=20_000)
    code = (
        "import sys; from rich.console import Console; from llmtrain.prep.config import PrepRecipe; "
        "from llmtrain.prep.run import run; run(PrepRecipe.model_validate_json(sys.argv[1]), Console())"
    )
    process = subprocess.Popen([sys.executable, "-c", code, made_recipe.model_dump_json()], stdout=subprocess.DEVNULL)
    partial = tmp_path / ".out.partial"
    deadline = time.monotonic() + 300
    while not list(partial.glob("train/shard*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("index.json"))
    make(made_recipe)
    make(recipe(tmp_path, docs, size_limit=20_000, out=str(tmp_path / "whole")))
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert not partial.exists()


def test_starts_without_heavy_imports(tmp_path, docs):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(tmp_path, docs).model_dump(mode="json")))
    code = (
        "import sys; from pathlib import Path; from llmtrain.prep.run import prepare; prepare(Path(sys.argv[1])); "
        "heavy = {'torch', 'streaming', 'composer', 'transformers', 'datasets', 'pyarrow'}; "
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_prepare_reads_the_file_and_overrides(tmp_path, docs, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(tmp_path, docs).model_dump(mode="json")))
    prepare(file, [f"out={tmp_path}/other", "max_seq_len=16"])
    assert rows(tmp_path / "other" / "train").shape[1] == 16
    assert "tokens that fill no row" in capsys.readouterr().out


@pytest.mark.parametrize("file", sorted((ROOT / "data_prep").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid(file):
    load_recipe(file)


def test_task_decides_on_the_keys(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("out: x\nsources: [{name: a, files: [a]}]\n")
    assert load_recipe(file, ["task=finetuning"]).task == "finetuning"
    with pytest.raises(UserError, match="max_seq_len"):
        load_recipe(file)
    with pytest.raises(UserError, match=r"pretraining.*finetuning"):
        load_recipe(file, ["task=finetunning"])
    with pytest.raises(UserError, match="max_seq_len"):
        load_recipe(file, ["task=finetuning", "max_seq_len=8"])


@pytest.mark.slow
def test_tiny_recipe_runs(tmp_path):
    content = run(load(ROOT / "data_prep" / "tiny.yaml", PrepRecipe, [f"out={tmp_path}/tiny"]), Console())
    assert content["splits"]["train"]["tokens"] > 1_500_000
    assert content["splits"]["val"]["samples"] > 100
    assert content["vocab_size"] == 4096


def test_rows_of_long_documents_only(tmp_path, docs):
    """Each row is of one document, and the last one ends where the document ends."""
    content, said = make(recipe(tmp_path, docs, cut="documents", min_document_tokens=100))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    for split, wanted in (("train", False), ("val", True)):
        texts = [text for text, held in zip(docs[1], held_out(docs[1]), strict=True) if held == wanted]
        ids = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
        kept = [document for document in ids if len(document) > 100]
        starts = [sorted({*range(0, len(d) - SEQ + 1, SEQ), len(d) - SEQ}) for d in kept]
        expected = [d[i : i + SEQ] for d, places in zip(kept, starts, strict=True) for i in places]
        assert rows(tmp_path / "out" / split).tolist() == expected
        counts = content["splits"][split]
        assert (counts["documents"], counts["dropped_documents"]) == (len(kept), len(ids) - len(kept))
        assert counts["repeated_tokens"] == len(expected) * SEQ - counts["tokens"] > 0
        assert counts["dropped_tokens"] == 0
    assert "documents below min_document_tokens" in said
    assert "repeated: " in said


def test_a_source_for_one_split(tmp_path, docs):
    place = {"files": [str(docs[0])]}
    sources = [{"name": "a", **place, "into": "train"}, {"name": "b", **place, "max_documents": 50, "into": "val"}]
    content, said = make(recipe(tmp_path, docs, val_fraction=0, sources=sources))
    assert {split: counts["documents"] for split, counts in content["splits"].items()} == {"train": 300, "val": 50}
    assert "eval_loader" in said


def test_data_that_was_made_before_a_key_existed_is_still_complete(tmp_path, docs):
    made_recipe = recipe(tmp_path, docs)
    make(made_recipe)
    path = tmp_path / "out" / "prep.json"
    old = json.loads(path.read_text())
    old["recipe"]["min_tokens"] = old["recipe"].pop("min_document_tokens")
    del old["recipe"]["cut"], old["recipe"]["tail"], old["recipe"]["sources"][0]["join"]
    path.write_text(json.dumps(old))
    assert "nothing to do" in make(made_recipe)[1]
    with pytest.raises(UserError, match="changed since: cut, min_document_tokens"):
        make(recipe(tmp_path, docs, cut="documents", min_document_tokens=2))
