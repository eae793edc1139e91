import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmtrain.errors import UserError
from llmtrain.prep import ranks
from llmtrain.prep.local_work import LocalWork
from llmtrain.prep.run import Options, prepare, prepare_merge

COMMAND = [str(Path(sys.executable).parent / "llmtrain"), "prep"]


def llmtrain(*arguments):
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done


def rank(file, number, world_size):
    prepare(file, (), Options(processes=1, rank=number, world_size=world_size))


@pytest.mark.parametrize("order", range(3))
def test_ranks_in_any_order_and_merge_give_what_one_process_gives(corpus, digest, order, capsys):
    expected = corpus.reference()
    file = corpus.file()
    numbers = list(range(4))
    random.Random(order).shuffle(numbers)
    for number in numbers:
        assert not corpus.out.exists()
        rank(file, number, 4)
    prepare_merge(file)
    assert digest(corpus.out) == expected
    said = capsys.readouterr().out
    assert f"rank {numbers[0]} of 4: its 5 partitions are done; 5 of 20 in all" in said
    assert "train_loader:" in said
    rank(file, 1, 4)
    prepare_merge(file)
    assert capsys.readouterr().out.count("nothing to do") == 2
    assert digest(corpus.out) == expected
    assert not corpus.partial.exists()


def test_ranks_at_the_same_time(corpus, digest):
    """Real processes, started together: one of them plans, the tokenizer is trained once."""
    changes = {"tokenizer": {"train": {"vocab_size": 280}}}
    expected = corpus.reference(**changes)
    file = corpus.file(**changes)
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda n: llmtrain(file, "--rank", n, "--world-size", 3, "--processes", 2), range(3)))
    assert [one.returncode for one in done] == [0, 0, 0]
    assert sum("training a tokenizer" in one.stdout for one in done) == 1
    assert llmtrain("merge", file).returncode == 0
    assert digest(corpus.out) == expected


def test_merge_names_what_is_missing(corpus):
    file = corpus.file()
    rank(file, 1, 2)
    with pytest.raises(UserError, match=r"10 of 20 partitions are missing: 0, 2, 4, .*modulo world size"):
        prepare_merge(file)
    assert not corpus.out.exists()
    content, said = corpus.make()  # without ranks: the rest, and the merge
    assert "going on: 10 of 20" in said
    assert content["partitions"] == 20


def test_merge_without_work(corpus):
    with pytest.raises(UserError, match="nothing to merge"):
        prepare_merge(corpus.file())
    assert not corpus.partial.exists()


def test_merge_of_another_recipe_is_refused(corpus):
    rank(corpus.file(), 0, 1)
    with pytest.raises(UserError, match="changed since: max_seq_len"):
        prepare_merge(corpus.file(max_seq_len=32))
    with pytest.raises(UserError, match="changed since: max_seq_len"):
        rank(corpus.file(max_seq_len=32), 0, 1)


def test_a_rank_is_one_process_and_the_whole_is_none_meanwhile(corpus):
    file = corpus.file()
    work = LocalWork(corpus.out)
    with work.lock("output", shared=True), work.lock("rank-00001"):
        rank(file, 0, 2)
        with pytest.raises(UserError, match="another `llmtrain prep`"):
            rank(file, 1, 2)
        for alone in (lambda: corpus.make(), lambda: prepare_merge(file)):
            with pytest.raises(UserError, match="another `llmtrain prep`"):
                alone()
    rank(file, 1, 2)
    prepare_merge(file)
    assert corpus.out.exists()


def test_ranks_replace_an_older_output_once_that_was_allowed(corpus, digest):
    corpus.make(max_seq_len=32)
    older = digest(corpus.out)
    file = corpus.file()
    with pytest.raises(UserError, match="changed since: max_seq_len"):
        rank(file, 0, 1)
    prepare(file, (), Options(only_plan=True, overwrite=True))
    rank(file, 0, 1)
    assert digest(corpus.out) == older
    prepare_merge(file)
    assert digest(corpus.out) == corpus.reference()


def test_passes_of_stages(corpus, digest):
    """Ranks go as far as they can without the others, and say what they wait for."""
    changes = {"stages": [{"name": "exact_dedup"}, {"name": "length", "min_words": 20}]}
    for path in corpus.files[1:]:
        path.write_text(corpus.files[0].read_text())
    expected = corpus.reference(**changes)
    content, said = corpus.make(Options(processes=2), **changes, out=str(corpus.folder / "two"))
    assert digest(corpus.folder / "two") == expected
    assert [stage["dropped"] > 100 for stage in content["stages"]] == [True, False]
    assert "exact_dedup" in said
    file = corpus.file(**changes)
    rank(file, 0, 2)
    with pytest.raises(UserError, match="20 of 20 partitions are missing"):
        prepare_merge(file)
    rank(file, 1, 2)  # the last one reduces, and goes on
    rank(file, 0, 2)
    prepare_merge(file)
    assert digest(corpus.out) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "0"], "go together"),
        (["--rank", "3", "--world-size", "3"], "from 0 to 2"),
        (["--rank", "0", "--world-size", "2", "--overwrite"], "concern all ranks"),
        (["--rank", "0", "--world-size", "2", "--engine", "spark"], "shares out the work itself"),
        (["--processes", "0"], "at least 1"),
        (["--processes", "0", "--plan"], "at least 1"),
        (["--rank", "0", "--world-size", "0"], "--world-size 0: give at least 1"),
        (["--rank", "0", "--world-size", "2", "--processes", "-1"], "at least 1"),
        (["--engine", "spark", "--processes", "3"], "is Spark's affair"),
        (["--engine", "ray"], "expected local, spark or datatrove"),
        (["--master", "local[2]"], "--engine spark"),
    ],
)
def test_options_that_do_not_go_together(corpus, options, message):
    done = llmtrain(corpus.file(), *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert not corpus.out.exists()
    assert not corpus.partial.exists()


def test_only_plan(corpus):
    done = llmtrain("--plan", corpus.file(), "max_seq_len=32")
    assert done.returncode == 0
    assert "20 partitions" in done.stdout
    assert not corpus.out.exists()
    assert "going on: 0 of 20" in corpus.make(max_seq_len=32)[1]


def test_conversations_have_no_ranks(tmp_path):
    file = tmp_path / "chat.yaml"
    file.write_text(f"task: finetuning\nout: {tmp_path}/chat\nsources: [{{name: a, files: [a.jsonl]}}]\n")
    with pytest.raises(UserError, match="carried out by one process"):
        rank(file, 0, 2)
    with pytest.raises(UserError, match="nothing to merge"):
        prepare_merge(file)


def test_a_rank_that_comes_while_the_output_is_merged(corpus, digest, monkeypatch, capsys):
    """It has looked before the merge and gets its lock behind it: what is finished is not begun again."""
    file = corpus.file(overwrite=True)
    rank(file, 0, 1)
    looked = ranks.finished

    def looks_first(job, inputs):
        monkeypatch.setattr(ranks, "finished", looked)
        found = looked(job, inputs)
        prepare_merge(file)
        return found

    monkeypatch.setattr(ranks, "finished", looks_first)
    rank(file, 0, 1)
    assert "nothing to do" in capsys.readouterr().out
    assert not corpus.partial.exists()
    assert digest(corpus.out) == corpus.reference()


def test_ranks_that_come_and_go_do_not_turn_each_other_away(tmp_path):
    """Who leaves looks whether it was the last, and has the lock alone for that moment."""
    work = LocalWork(tmp_path / "out")

    def come_and_go() -> None:
        for _ in range(200):
            with work.lock("output", shared=True):
                pass

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(come_and_go) for _ in range(8)]:
            done.result()


@pytest.mark.parametrize("problem", [FileNotFoundError, FileExistsError])
def test_folders_that_go_are_made_again_however_long_a_rank_has_waited(tmp_path, monkeypatch, problem):
    mkdir, problems = Path.mkdir, [problem()]

    def gone_once(*args, **kwargs) -> None:
        if problems:
            raise problems.pop()
        mkdir(*args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", gone_once)
    monkeypatch.setattr("llmtrain.prep.local_work._PATIENCE", -1.0)  # over before it begins
    with LocalWork(tmp_path / "out").lock("output", wait=True):
        assert not problems


def test_folders_that_cannot_be_made_are_an_error(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/.work").write_text("")
    with pytest.raises((UserError, OSError), match=r"\.work"), LocalWork(tmp_path / "out").lock("output"):
        pass
