import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from llmtrain.errors import UserError
from llmtrain.prep.fragments import LONG
from llmtrain.prep.run import Options
from tests.prep.failures import FailingStage

pytest.importorskip("datatrove", reason="the extra [datatrove] is not installed")

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import JsonlReader

from llmtrain.data.mds_files import read_index
from llmtrain.data.verify import read_shard
from llmtrain.prep.datatrove import MDSMerge, MDSWriter, RecipePartitions, RecipePass

ENGINE = Options(engine="datatrove", processes=2)


def execute(folder, *steps, tasks=4, workers=2):
    LocalPipelineExecutor(list(steps), tasks=tasks, workers=workers, logging_dir=str(folder)).run()


def rows(folder):
    found = []
    for entry in read_index(folder).shards:
        found += [ids.astype(np.int64) for ids in read_shard(folder, entry).tokens(np.dtype("<i8"))]
    return np.concatenate(found)


def test_the_engines_output_is_the_local_engines(corpus, digest):
    corpus.make(ENGINE)
    assert digest(corpus.out) == corpus.reference()
    assert "nothing to do" in corpus.make(ENGINE)[1]


@pytest.mark.slow
def test_after_a_failure_only_what_is_missing_is_made(corpus, digest, monkeypatch):
    stage = FailingStage(corpus, monkeypatch)
    reference = corpus.reference()
    stage.order("once")
    with pytest.raises(UserError, match=r"2\.jsonl.*stage function failed: OSError: told to fail"):
        corpus.make(ENGINE)
    assert stage.failed == ["once"]
    assert not corpus.out.exists()
    done = corpus.finished_shards()
    corpus.make(ENGINE)
    assert digest(corpus.out) == reference
    assert done
    assert all((corpus.out / name).stat().st_mtime_ns == time for name, time in done.items())


@pytest.mark.long
@pytest.mark.slow
def test_a_recipe_in_a_pipeline_of_the_users(corpus, digest, tmp_path, monkeypatch):
    stage = FailingStage(corpus, monkeypatch)
    reference = corpus.reference()
    recipe = corpus.file()
    stage.order("once")
    with pytest.raises(UserError, match="told to fail"):
        execute(tmp_path / "logs", RecipePartitions(recipe))
    with pytest.raises(UserError, match="partitions are missing"):
        execute(tmp_path / "logs-merge", MDSMerge(recipe), tasks=1)
    execute(tmp_path / "logs", RecipePartitions(recipe))
    assert not corpus.out.exists()
    execute(tmp_path / "logs-merge", MDSMerge(recipe), tasks=1)
    assert digest(corpus.out) == reference
    execute(tmp_path / "logs-again", MDSMerge(recipe), tasks=1)  # finds it done
    assert digest(corpus.out) == reference


def test_a_stage_that_needs_a_pass_takes_an_executor_more(corpus, digest, tmp_path):
    stages = [{"name": "exact_dedup"}]
    recipe = corpus.recipe(stages=stages)
    with pytest.raises(UserError, match="not all ranks have done 0-exact_dedup"):
        execute(tmp_path / "logs", RecipePartitions(recipe), workers=1)
    execute(tmp_path / "logs-pass", RecipePass(recipe), workers=1)
    execute(tmp_path / "logs", RecipePartitions(recipe), workers=1)
    execute(tmp_path / "logs-merge", MDSMerge(recipe), tasks=1)
    assert digest(corpus.out) == corpus.reference(stages=stages)


def test_the_writer_gives_the_bytes_of_partitions_of_the_same_documents(corpus, digest, tmp_path):
    """A task reads one file, as a partition of a file each does."""
    corpus.base |= {"val_fraction": 0.0, "partition_bytes": max(path.stat().st_size for path in corpus.files)}
    reader = JsonlReader(str(corpus.folder / "docs"), glob_pattern="*.jsonl")
    execute(tmp_path / "logs", reader, MDSWriter(corpus.recipe()))
    assert not corpus.out.exists()
    execute(tmp_path / "logs-merge", MDSMerge(corpus.recipe()), tasks=1)
    reference = corpus.reference()
    assert len([name for name in reference if name.startswith("train/shard.0000")]) >= 4
    made = digest(corpus.out)
    assert {name for name in made if made[name] != reference.get(name)} == {"prep.json"}
    assert set(made) == set(reference)
    content = json.loads((corpus.out / "prep.json").read_text())
    assert content["inputs"]["sources"] == {"docs": {"datatrove_tasks": 4}}
    assert content["splits"] == json.loads((corpus.folder / "reference" / "prep.json").read_text())["splits"]


@pytest.mark.long
@pytest.mark.slow
def test_the_writer_behind_a_filter_splits_by_id_and_reruns_what_failed(corpus, digest, tmp_path, small_tokenizer):
    def pipeline(out, filtered=True):
        recipe = corpus.recipe(out=str(out), val_fraction=0.3)
        steps = [JsonlReader(str(corpus.folder / "docs"), glob_pattern="*.jsonl")]
        steps += [LambdaFilter(lambda document: "naïve" in document.text)] if filtered else []
        return [*steps, MDSWriter(recipe)], [MDSMerge(recipe)]

    def breaks(data, rank=0, world_size=1):
        for number, document in enumerate(data):
            if rank == 2 and number == 100:
                raise OSError("the node is gone")
            yield document

    steps, merge = pipeline(tmp_path / "one")
    execute(tmp_path / "logs-1", *steps)
    execute(tmp_path / "logs-1-merge", *merge, tasks=1)
    steps, merge = pipeline(tmp_path / "two")
    with pytest.raises(OSError, match="the node is gone"):
        execute(tmp_path / "logs-2", *steps[:-1], breaks, steps[-1], workers=1)
    execute(tmp_path / "logs-2", *steps)
    execute(tmp_path / "logs-2-merge", *merge, tasks=1)
    one = digest(tmp_path / "one")
    assert digest(tmp_path / "two") == one
    content = json.loads((tmp_path / "one" / "prep.json").read_text())
    kept = [text for path in corpus.files for text in texts(path) if "naïve" in text]
    counts = content["splits"]
    assert counts["train"]["documents"] + counts["val"]["documents"] == len(kept)
    assert 0.2 < counts["val"]["documents"] / len(kept) < 0.4
    tokenizer = Tokenizer.from_file(str(small_tokenizer / "tokenizer.json"))
    tokens = sum(len(tokenizer.encode(text).ids) + 1 for text in kept)
    assert counts["train"]["tokens"] + counts["val"]["tokens"] == tokens
    # and the finished output is left alone
    execute(tmp_path / "logs-3", *pipeline(tmp_path / "one")[0])
    assert digest(tmp_path / "one") == one
    with pytest.raises(UserError, match="made with other settings"):
        execute(tmp_path / "logs-4", *pipeline(tmp_path / "one")[0], tasks=2, workers=1)


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_documents_of_any_kind_through_the_writer(corpus, tmp_path, small_tokenizer):
    long = "many words, one document. " * (3 * LONG // 25)
    documents = ["short one", "", "half a \ud83d pair", long, "naïve 日本"]

    def source(data, rank=0, world_size=1):
        from datatrove.data import Document

        for number, text in enumerate(documents):
            yield Document(text=text, id=f"made/{number}")

    recipe = corpus.recipe(val_fraction=0.0, on_error="skip")
    execute(tmp_path / "logs", source, MDSWriter(recipe), tasks=1, workers=1)
    execute(tmp_path / "logs-merge", MDSMerge(recipe), tasks=1)
    tokenizer = Tokenizer.from_file(str(small_tokenizer / "tokenizer.json"))
    ids = [i for text in ("short one", long, "naïve 日本") for i in [*tokenizer.encode(text).ids, 0]]
    found = rows(corpus.out / "train").reshape(-1)
    assert found.tolist() == ids[: len(found)]
    assert len(ids) - len(found) < 64
    content = json.loads((corpus.out / "prep.json").read_text())
    assert content["splits"]["train"]["documents"] == 3
    assert "made/2" in json.dumps(content["bad_input"])
    with pytest.raises(UserError, match=r"made/2.*surrogate"):
        execute(tmp_path / "2", source, MDSWriter(corpus.recipe(out=str(tmp_path / "b"))), tasks=1, workers=1)


def test_what_a_pipeline_cannot_do_is_refused(corpus):
    with pytest.raises(UserError, match="needs passes over all documents"):
        MDSWriter(corpus.recipe(stages=[{"name": "exact_dedup"}]))
    with pytest.raises(UserError, match="train the tokenizer before"):
        MDSWriter(corpus.recipe(tokenizer={"train": {"vocab_size": 300}}))
    two = [{"name": name, "files": [str(corpus.files[0])]} for name in ("a", "b")]
    with pytest.raises(UserError, match="one source, found 2"):
        MDSWriter(corpus.recipe(sources=two))


def test_another_number_of_tasks_on_unfinished_work_is_refused(corpus, tmp_path):
    reader = JsonlReader(str(corpus.folder / "docs"), glob_pattern="*.jsonl")
    execute(tmp_path / "logs", reader, MDSWriter(corpus.recipe()), tasks=4)
    with pytest.raises(UserError, match=r"the number of tasks \(was 4, is 2\)"):
        execute(tmp_path / "logs-2", reader, MDSWriter(corpus.recipe()), tasks=2, workers=1)
    with pytest.raises(UserError, match="nothing to merge"):
        execute(tmp_path / "m", MDSMerge(corpus.recipe(out=str(tmp_path / "elsewhere"))), tasks=1)
