"""Stages through `llmtrain prep`: real processes, real files."""

import json
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import yaml
from streaming import StreamingDataset
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[3]
TEXTS = [text for _, text in sorted(topics.items()) if len(text) > 1000]
QUESTION = "which of these seven ships was the first one to reach the harbour in the great storm"
CLI = "import sys; from llmtrain.cli import main; sys.argv[0] = 'llmtrain'; main()"

MODULE = """
import os, signal, time
from pathlib import Path

def is_wanted(text):
    with open("judged.log", "a") as log:
        log.write(f"{os.getpid()} {text[:30]!r}\\n")
    if "reach for the switch" in text and Path("kill").exists():
        while not list(Path(".").glob(".*/**/signed/*")):
            time.sleep(0.01)
        os.killpg(0, signal.SIGKILL)
    return "unwanted" not in text
"""


@pytest.fixture
def corpus(tmp_path):
    """Two files: chapters with copies, near copies, contaminated and short texts among them."""
    rng = random.Random(0)
    rows = list(TEXTS)
    rows += [text.replace("\n", " \n") for text in TEXTS[:6]]  # copies but for white space
    rows += [text.replace("the", "a", 1) for text in TEXTS[10:16]]  # near copies
    rows += [f"{text}\n{QUESTION.title()}?" for text in (TEXTS[20][:1500], TEXTS[21][:1500])]
    rows += ["too short", f"unwanted {TEXTS[22][:700]}", f"Mail jane@example.org, not 8.8.4.4. {TEXTS[23][:600]}"]
    rng.shuffle(rows)
    rows.insert(len(rows) * 2 // 3, f"reach for the switch {TEXTS[24][:900]}")
    for n in range(2):
        with (tmp_path / f"{n}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in rows[n::2])
    (tmp_path / "eval.jsonl").write_text(json.dumps({"id": "ship-7", "question": QUESTION}) + "\n")
    (tmp_path / "my_stages.py").write_text(MODULE)
    return tmp_path


def recipe(folder, **changes):
    made = {
        "out": "out",
        "max_seq_len": 64,
        "val_fraction": 0.1,
        "partition_bytes": 60_000,
        "tokenizer": {"train": {"vocab_size": 400, "max_bytes": 50_000}},
        "sources": [{"name": "chapters", "files": ["*[01].jsonl"]}],
        "stages": [
            {"name": "length", "min_chars": 100},
            {"name": "exact_dedup", "ignore": ["whitespace"]},
            {"name": "function", "function": "my_stages:is_wanted"},
            {"name": "minhash_dedup"},
            {"name": "decontaminate", "files": ["eval.jsonl"]},
            {"name": "pii"},
        ],
        **changes,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(made))


def prep(folder, *arguments, check=True):
    verb = [each for each in arguments if each == "merge"]
    options = [each for each in arguments if each != "merge"]
    command = [sys.executable, "-c", CLI, "prep", *verb, "recipe.yaml", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, start_new_session=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def decoded(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    rows = StreamingDataset(local=str(folder / "train"), batch_size=1, num_canonical_nodes=1)
    return tokenizer.decode(np.concatenate([rows[n]["tokens"] for n in range(rows.size)]).astype(int))


@pytest.mark.slow
def test_bytes_are_the_same_at_one_and_two_processes_and_the_report_says_what_was_dropped(corpus):
    recipe(corpus, val_fraction=0.0)
    done = prep(corpus, "--processes", "1")
    one = content(corpus / "out")
    stages = json.loads(one["prep.json"])["stages"]
    assert [(stage["name"], stage["dropped"], stage["changed"]) for stage in stages] == [
        ("length", 1, 0),
        ("exact_dedup", 6, 0),
        ("function", 1, 0),
        ("minhash_dedup", 6, 0),
        ("decontaminate", 2, 0),
        ("pii", 0, stages[-1]["changed"]),
    ]
    assert stages[-1]["changed"] >= 1
    assert "eval.jsonl:1" in stages[4]["samples"][0]["reason"]
    assert re.search(r"exact_dedup +\d+ +6 ", done.stdout)
    text = decoded(corpus / "out")
    assert "Mail <EMAIL>, not <IP>." in text
    assert "too short" not in text
    assert "unwanted" not in text
    assert QUESTION not in text.lower()
    prep(corpus, "--processes", "2", "out=two")
    assert content(corpus / "two") == one
    prep(corpus, "--processes", "2", "out=large", "partition_bytes=10000000")
    assert json.loads((corpus / "large/prep.json").read_text())["stages"] == stages


@pytest.mark.slow
def test_killed_in_a_pass_and_run_again(corpus):
    recipe(corpus)
    prep(corpus, "out=whole")
    (corpus / "kill").touch()
    killed = prep(corpus, "--processes", "1", check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (corpus / "out").exists()
    signed = [path.name for path in corpus.glob(".*/**/signed/*.npz")]
    assert any("minhash" in name for name in signed)  # some partitions, in the second pass
    (corpus / "kill").unlink()
    (corpus / "judged.log").unlink()
    prep(corpus, "--processes", "2")
    assert content(corpus / "out") == content(corpus / "whole")
    judged = (corpus / "judged.log").read_text().count("\n")
    documents = json.loads((corpus / "out/prep.json").read_text())["stages"][2]["seen"]
    assert documents < judged < 2 * documents  # once to be tokenised, and some once more, to be signed


@pytest.mark.slow
def test_a_changed_evaluation_file_makes_another_output(corpus):
    recipe(corpus)
    prep(corpus)
    assert "nothing to do" in prep(corpus).stdout
    (corpus / "eval.jsonl").write_text(json.dumps({"question": QUESTION.replace("seven", "eight")}) + "\n")
    refused = prep(corpus, check=False)
    assert refused.returncode == 2
    assert "stages" in refused.stdout + refused.stderr
    prep(corpus, "overwrite=true")
    assert json.loads((corpus / "out/prep.json").read_text())["stages"][4]["dropped"] == 2


def test_a_stage_that_fails_names_the_document_and_leaves_no_output(corpus):
    (corpus / "my_stages.py").write_text("def is_wanted(text):\n    return text.index('is')\n")
    recipe(corpus)
    failed = prep(corpus, check=False)
    assert failed.returncode == 2
    assert failed.stdout.splitlines()[0] == "stage function runs my_stages:is_wanted, as the recipe says"
    message = " ".join((failed.stdout + failed.stderr).split())
    assert re.search(r"[01]\.jsonl, byte \d+: stage function: my_stages:is_wanted returned \d+", message)
    assert "Traceback" not in message
    assert not (corpus / "out").exists()


@pytest.mark.parametrize(
    ("stages", "banned"),
    [
        ([], ["rensa", "scipy", "datatrove", "spacy"]),
        ([{"name": "length", "min_chars": 100}, {"name": "exact_dedup"}], ["rensa", "scipy", "datatrove", "spacy"]),
    ],
)
def test_only_what_a_recipe_needs_is_imported(corpus, stages, banned):
    recipe(corpus, stages=stages)
    code = (
        "import sys, atexit; from pathlib import Path\n"
        f"atexit.register(lambda: print('IMPORTED', [name for name in {banned} if name in sys.modules]))\n{CLI}"
    )
    command = [sys.executable, "-c", code, "prep", "recipe.yaml", "--processes", "1"]
    done = subprocess.run(command, cwd=corpus, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("IMPORTED []")


@pytest.mark.slow
def test_the_recipe_of_the_docs(tmp_path):
    text = re.search(r"```yaml\n(.*?)```", (ROOT / "docs/data-quality.md").read_text(), re.DOTALL)[1]
    (tmp_path / "recipe.yaml").write_text(text)
    for folder in ("notes", "evaluation"):
        (tmp_path / folder).mkdir()
    rows = [TEXTS[0], TEXTS[1], TEXTS[0].replace("\n", " "), f"{TEXTS[2]} {QUESTION}"]
    (tmp_path / "notes/a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "evaluation/a.jsonl").write_text(json.dumps({"question": QUESTION}))
    (tmp_path / "my_stages.py").write_text("def is_wanted(text):\n    return 'Tkinter' not in text\n")
    done = prep(tmp_path, "--processes", "2")
    stages = {stage["name"]: stage for stage in json.loads((tmp_path / "clean/prep.json").read_text())["stages"]}
    assert stages["exact_dedup"]["dropped"] >= 1
    assert stages["decontaminate"]["counts"] == {"a.jsonl": 1}
    assert "exact_dedup" in done.stdout
    assert (tmp_path / "clean/train/index.json").exists()


@pytest.mark.slow
def test_ranks_take_a_round_for_each_pass_and_make_the_same_bytes(corpus):
    stages = [{"name": "exact_dedup"}, {"name": "minhash_dedup"}]
    recipe(corpus, stages=stages, partition_bytes=200_000)
    prep(corpus, "out=whole")
    said = ["", ""]
    for _ in range(3):  # a round for each pass, and one for the tokens
        said = [prep(corpus, "--rank", str(rank), "--world-size", "2").stdout for rank in range(2)]
    assert all("partitions are done" in each for each in said)
    prep(corpus, "merge")
    assert content(corpus / "out") == content(corpus / "whole")
