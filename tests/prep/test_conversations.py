import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
import zstandard
from rich.console import Console
from streaming import StreamingDataset
from streaming.base.format.mds.reader import MDSReader

from llmtrain.conversations.formats import parse
from llmtrain.conversations.messages import Chat, PromptResponse
from llmtrain.errors import UserError
from llmtrain.prep.conversation_config import ConversationRecipe
from llmtrain.prep.conversation_sources import question
from llmtrain.prep.conversations import run
from llmtrain.prep.run import load_recipe, prepare

ROOT = Path(__file__).parents[2]


def chat(i):
    turns = [{"role": "user", "content": f"What is {i}+1? ü"}, {"role": "assistant", "content": f"It is {i + 1}."}]
    more = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    return {"messages": turns + more if i % 3 == 0 else turns}


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(chat(i)) + "\n" for i in range(200)))
    return path


def recipe(tmp_path, *sources, **changes):
    base = {"task": "finetuning", "out": str(tmp_path / "out"), "val_fraction": 0.2}
    named = [{"name": f"s{i}", **source} for i, source in enumerate(sources)]
    return ConversationRecipe.model_validate({**base, "sources": named, **changes})


def make(made_recipe):
    console = Console(file=io.StringIO(), width=200)
    return run(made_recipe, console), console.file.getvalue()


def rows(folder):
    """What Streaming reads; `StreamingDataset` itself would take a millisecond a row."""
    index = json.loads((folder / "index.json").read_text())
    out = []
    for entry in index["shards"]:
        packed = folder / entry["zip_data"]["basename"]
        packed.with_suffix("").write_bytes(zstandard.decompress(packed.read_bytes()))
        reader = MDSReader.from_json(str(folder), None, entry)
        out += [reader[i] for i in range(len(reader))]
        packed.with_suffix("").unlink()
    return out


def digest(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_chats_are_written_as_messages_and_split(tmp_path, chats):
    content, said = make(recipe(tmp_path, {"files": [str(chats)]}))
    train, val = rows(tmp_path / "out/train"), rows(tmp_path / "out/val")
    assert all(set(row) == {"messages"} for row in train + val)
    in_order = [row["messages"] for row in train + val]
    assert sorted(in_order, key=str) == sorted((chat(i)["messages"] for i in range(200)), key=str)
    assert 20 < len(val) < 60
    assert content == json.loads((tmp_path / "out/prep.json").read_text())
    counts = content["splits"]["train"]
    assert counts["samples"] == len(train)
    assert counts["turns"] == sum(len(row["messages"]) // 2 for row in train)
    assert counts["bytes"] == sum(len(turn["content"].encode()) for row in train for turn in row["messages"])
    assert all(isinstance(parse(row), Chat) for row in train)
    assert "s0: 200 rows read, 0 duplicates dropped" in said
    dataset = StreamingDataset(local=str(tmp_path / "out/val"), batch_size=1, num_canonical_nodes=1)
    assert list(dataset) == val


def test_prompts_and_responses_have_columns_of_their_own(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("q,a\nwhy,so\nwho,me\nwhén,now\n")
    mapping = {"prompt": "q", "response": "a"}
    made = recipe(tmp_path, {"files": [str(path)], "preprocessing_fn": mapping}, val_fraction=0)
    make(made)
    assert rows(tmp_path / "out/train") == [
        {"prompt": "why", "response": "so"},
        {"prompt": "who", "response": "me"},
        {"prompt": "whén", "response": "now"},
    ]


def test_one_question_is_on_one_side_whatever_the_source_and_the_answer(tmp_path, chats):
    other = tmp_path / "other.jsonl"
    lines = []
    for i in range(200):
        row = chat(i)["messages"]
        row[1]["content"] = "Another answer."
        lines.append(json.dumps({"conversations": [{"role": "system", "content": "S"}, *row]}) + "\n")
    other.write_text("".join(reversed(lines)))
    make(recipe(tmp_path, {"files": [str(chats)]}, {"files": [str(other)]}))
    asked = [{question(parse(row)) for row in rows(tmp_path / "out" / split)} for split in ("train", "val")]
    assert not asked[0] & asked[1]
    assert len(asked[0] | asked[1]) == 200


def test_duplicates_and_malformed_rows_are_dropped_and_counted(tmp_path, chats):
    with chats.open("a") as file:
        file.write(json.dumps({"id": 7, **chat(5)}) + "\n")
        file.write('{"messages": []}\n{broken\n{"messages": [{"role": "user", "content": ""}]}\n{"messages": []}\n')
    again = tmp_path / "again.jsonl"
    again.write_text(json.dumps(chat(6)) + "\n" + json.dumps(chat(1000)) + "\n")
    sources = ({"files": [str(chats)]}, {"files": [str(again)]})
    content, said = make(recipe(tmp_path, *sources))
    found = content["rows"]["s0"]
    assert (found["rows"], found["duplicates"]) == (205, 1)
    assert found["dropped"] == {"no turns": 2, "broken JSON": 1, "empty turn": 1}
    assert found["first"]["no turns"].startswith(f"{chats}, line 202: ")
    assert content["rows"]["s1"] == {"rows": 2, "duplicates": 1, "dropped": {}, "first": {}}
    assert sum(split["samples"] for split in content["splits"].values()) == 201
    assert f"  2 dropped: no turns (first: {chats}, line 202: messages is empty)" in said
    with pytest.raises(UserError, match=r"source 's0': .*chats\.jsonl, line 202: no turns.*strict: true"):
        make(recipe(tmp_path, *sources, strict=True, out=str(tmp_path / "strict")))
    assert not (tmp_path / "strict").exists()


def test_sources_with_a_split_of_their_own_and_a_cap(tmp_path, chats):
    extra = tmp_path / "extra.jsonl"
    extra.write_text("".join(json.dumps(chat(i)) + "\n" for i in range(190, 230)))
    sources = ({"files": [str(chats)], "into": "train", "max_examples": 195}, {"files": [str(extra)], "into": "val"})
    content, _ = make(recipe(tmp_path, *sources, val_fraction=0))
    assert content["splits"]["train"]["samples"] == 195
    assert content["splits"]["val"]["samples"] == 35
    assert content["rows"]["s1"]["duplicates"] == 5


def test_one_folder_a_source_and_its_loader(tmp_path, chats):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"{i}", "completion": "x"}) + "\n" for i in range(50)))
    sources = [
        {"name": "chats", "files": [str(chats)], "proportion": 0.75, "into": "train"},
        {"name": "pairs", "files": [str(pairs)], "proportion": 0.25},
    ]
    content, said = make(recipe(tmp_path, sources=sources, split_by_source=True))
    assert set(content["splits"]) == {"chats/train", "pairs/train", "pairs/val"}
    assert isinstance(parse(rows(tmp_path / "out/pairs/val")[0]), PromptResponse)
    snippet = yaml.safe_load(said[said.index("train_loader:") :])
    assert snippet["train_loader"]["dataset"]["streams"] == {
        "chats": {"local": f"{tmp_path}/out/chats/train", "proportion": 0.75},
        "pairs": {"local": f"{tmp_path}/out/pairs/train", "proportion": 0.25},
    }
    assert set(snippet["eval_loader"]["dataset"]["streams"]) == {"pairs"}
    with pytest.raises(UserError, match=r"pairs\.jsonl, line 1 is a PromptResponse.*split_by_source"):
        make(recipe(tmp_path, {"files": [str(chats)]}, {"files": [str(pairs)]}, out=str(tmp_path / "mixed")))


def test_loader_yaml_is_a_valid_loader(tmp_path, chats):
    config = pytest.importorskip("llmtrain.data.finetuning.config")
    _, said = make(recipe(tmp_path, {"files": [str(chats)]}))
    snippet = yaml.safe_load(said[said.index("train_loader:") :])
    for loader in snippet.values():
        loader["dataset"]["max_seq_len"] = 64  # of the training recipe, which hands it to both
    train = config.FinetuningLoaderConfig.model_validate(snippet["train_loader"])
    assert train.dataset.local == str(tmp_path / "out/train")
    assert config.FinetuningLoaderConfig.model_validate(snippet["eval_loader"]).drop_last is False


def test_same_inputs_same_bytes_and_a_second_run_does_nothing(tmp_path, chats):
    first, _ = make(recipe(tmp_path, {"files": [str(chats)]}))
    make(recipe(tmp_path, {"files": [str(chats)]}, out=str(tmp_path / "again")))
    assert digest(tmp_path / "out") == digest(tmp_path / "again")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again, said = make(recipe(tmp_path, {"files": [str(chats)]}))
    assert again == first
    assert said.count("\n") == 1
    assert "nothing to do" in said
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_another_recipe_or_other_data_is_refused_unless_overwrite(tmp_path, chats, monkeypatch):
    functions = tmp_path / "my_adapter.py"
    functions.write_text("def f(row):\n    return row\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LLMTRAIN_TRUST_CODE", "1")
    source = {"files": [str(chats)], "preprocessing_fn": "my_adapter:f"}
    make(recipe(tmp_path, source))
    with pytest.raises(UserError, match=r"changed since: val_fraction.*overwrite=true"):
        make(recipe(tmp_path, source, val_fraction=0.1))
    functions.write_text("def f(row):\n    return dict(row)\n")
    with pytest.raises(UserError, match="of s0"):
        make(recipe(tmp_path, source))
    make(recipe(tmp_path, source, overwrite=True))
    with chats.open("a") as file:
        file.write(json.dumps(chat(500)) + "\n")
    with pytest.raises(UserError, match="of s0"):
        make(recipe(tmp_path, source))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] == ".") == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            '{"messages": []}\n{"text": 1}\n',
            r"train would be empty.*2 rows.*malformed: 1 no turns \(.*line 1: messages",
        ),
        (json.dumps(chat(1)), "val would be empty"),
        ('{"turns": [{"input_ids": [1], "labels": [2]}]}', "line 1 holds token ids"),
    ],
)
def test_nothing_to_write(tmp_path, data, message):
    path = tmp_path / "a.jsonl"
    path.write_text(data)
    with pytest.raises(UserError, match=message):
        make(recipe(tmp_path, {"files": [str(path)]}, val_fraction=1e-9))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"files": ["a.jsonl"], "hf_name": "x"}, "either files or hf_name"),
        ({"hf_name": "x", "format": "python_docstrings"}, "reads Python files"),
        ({"files": ["a"], "format": "python_doctests", "preprocessing_fn": "alpaca"}, "reads Python files"),
        ({"files": ["a"], "safe_load": True}, "safe_load needs hf_name"),
        ({"files": ["a"], "proportion": 0.5}, "split_by_source"),
        ({"files": ["a"], "into": "test"}, "into"),
    ],
)
def test_mistakes_in_the_recipe(tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, source)


def test_hugging_face_folder(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    lines = [{"instruction": f"Do {i}", "context": "", "response": "Done", "category": "x"} for i in range(20)]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"hf_name": str(folder), "preprocessing_fn": "databricks-dolly-15k"}
    content, _ = make(recipe(tmp_path, source, val_fraction=0))
    assert content["splits"]["train"]["samples"] == 20
    assert rows(tmp_path / "out/train")[3]["messages"][0] == {"role": "user", "content": "Do 3"}
    with (folder / "train.jsonl").open("a") as file:
        file.write(json.dumps({**lines[0], "instruction": "One more"}) + "\n")
    with pytest.raises(UserError, match="of s0"):
        make(recipe(tmp_path, source, val_fraction=0))


def test_starts_without_heavy_imports(tmp_path, chats):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(tmp_path, {"files": [str(chats)]}).model_dump(mode="json")))
    code = (
        "import sys; from pathlib import Path; from llmtrain.prep.run import prepare; prepare(Path(sys.argv[1])); "
        "print('HEAVY', sorted({'torch', 'streaming', 'composer', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.long
def test_tiny_recipes_hold_out_the_same_names(tmp_path):
    """The chat twin is trained after the instruct twin: what one is examined on, the other must not learn."""
    asked = {}
    for name in ("tiny-instruct", "tiny-chat"):
        prepare(ROOT / f"data_prep/{name}.yaml", [f"out={tmp_path}/{name}"])
        for split in ("train", "val"):
            examples = [parse(row) for row in rows(tmp_path / name / split)]
            asked[name, split] = {question(example) for example in examples}
    assert not asked["tiny-instruct", "val"] & asked["tiny-chat", "train"]
    assert not asked["tiny-chat", "val"] & asked["tiny-instruct", "train"]
    assert len(asked["tiny-instruct", "train"]) > 2500
    assert len(asked["tiny-chat", "val"]) > 120
    done = json.loads((tmp_path / "tiny-chat/prep.json").read_text())
    assert done["splits"]["train"]["turns"] > done["splits"]["train"]["samples"] + 300


@pytest.mark.parametrize("name", ["mpt-7b-instruct", "mpt-7b-chat"])
def test_the_published_recipes_name_functions_that_exist(name):
    from llmtrain.conversations import preprocessing

    for source in load_recipe(ROOT / f"data_prep/{name}.yaml").sources:
        assert callable(preprocessing.resolve(source.preprocessing_fn, default_for=source.hf_name))
