import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint.hugging_face import write_hf_folder
from llmtrain.errors import UserError
from llmtrain.generation import batch
from llmtrain.generation.batch import Answering, as_json
from llmtrain.generation.command import generate_command
from llmtrain.generation.load import load
from llmtrain.generation.requests import Requests
from llmtrain.generation.settings import Settings

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "again", "and", "again"]


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write(file: Path, *lines: Any) -> Path:
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return file


def many(file: Path, n: int) -> Path:
    """Prompts of very different lengths, some with settings of their own, some with several texts."""
    lines: list[dict[str, Any]] = []
    for i in range(n):
        text = " ".join(WORDS[: 1 + i * 5 % 11])
        if i % 5 == 3:
            parameters = {"do_sample": i % 2 == 0, "temperature": 1.3, "top_p": 0.9, "max_new_tokens": 3 + i % 4}
            lines.append({"id": i, "input_data": {"input_string": [text, "fox"], "parameters": parameters}})
        else:
            lines.append({"id": i, "prompt": text})
    return write(file, *lines)


def test_lines_of_every_form(exported: Path, tmp_path: Path, capsys) -> None:
    source = write(
        tmp_path / "in.jsonl",
        {"id": 7, "prompt": "the döner"},
        {"input_data": {"input_string": ["the", "lazy"], "parameters": {"max_new_tokens": 2, "do_sample": False}}},
        {"prompt": "the", "parameters": {"max_new_tokens": 3, "temperature": 0, "return_full_text": True}, "n": [1]},
        {"input_data": {"input_string": "fox", "parameters": {"return_full_text": False, "top_k": None}}},
    )
    target = tmp_path / "out.jsonl"
    generate_command(exported, prompts_file=source, max_new_tokens=5, output=target, seed=5)
    plain, azure, full, bare = lines_of(target)
    assert {key: plain[key] for key in ("id", "prompt")} == {"id": 7, "prompt": "the döner"}
    assert plain["finish_reason"] in ("stop", "length")
    # The response of the endpoint: a row for each text, which begins with it.
    assert [list(row) for row in azure["output"]] == [["0"], ["0"]]
    assert azure["output"][0]["0"].startswith("the")
    assert azure["output"][1]["0"].startswith("lazy")
    assert azure["input_data"]["input_string"] == ["the", "lazy"]
    assert azure["finish_reason"] == ["length", "length"]
    assert full["n"] == [1]
    # Greedy: the two new tokens of the first are the first two of the three of the other.
    assert full["completion"].startswith(azure["output"][0]["0"])
    assert not bare["output"][0]["0"].startswith("fox") or bare["output"][0]["0"].count("fox") > 1
    assert capsys.readouterr().out == ""
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out.jsonl", "out.jsonl.job.json"]


def test_a_conversation_is_answered(exported: Path, tmp_path: Path) -> None:
    folder = exported
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    messages = [{"role": "user", "content": "the fox?"}]
    source = write(tmp_path / "in.jsonl", {"messages": messages, "id": 1})
    generate_command(folder, prompts_file=source, max_new_tokens=6, temperature=0, output=tmp_path / "out.jsonl")
    (line,) = lines_of(tmp_path / "out.jsonl")
    rendered = load(folder)[1].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered != "the fox?"
    (expected,) = generate_command(folder, [rendered], max_new_tokens=6, temperature=0)
    assert line == {"messages": messages, "id": 1, "completion": expected.text, "finish_reason": line["finish_reason"]}


def test_a_tokenizer_without_a_template_is_named_with_the_line(exported: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "x"}, {"messages": [{"role": "user", "content": "x"}]})
    with pytest.raises(UserError, match=r"in\.jsonl, line 2: .*no chat template"):
        generate_command(exported, prompts_file=source, output=tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "line 2: not JSON"),
        ('["x"]', "line 2: expected an object"),
        ('{"prompt": 3}', "line 2: expected a text"),
        ('{"prompt": "x", "messages": []}', "line 2: .*this one has prompt and messages"),
        ('{"messages": [{"role": "user"}]}', "line 2: expected `messages`"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "line 2: .*nothing to answer"),
        ('{"input_data": {"input_string": []}}', "line 2: expected `input_data`"),
        ('{"input_data": {"input_string": ["x"], "params": {}}}', "line 2: input_data has `params`"),
        ('{"prompt": "x", "parameters": {"num_beams": 4}}', "line 2: parameters: `num_beams` is not supported"),
        ('{"prompt": "x", "parameters": {"top_p": "1"}}', "line 2: parameters.top_p: '1' is not a number"),
        ('{"prompt": "x", "parameters": {"max_new_tokens": 0}}', "line 2: max_new_tokens 0"),
        ('{"prompt": "x", "parameters": {"do_sample": true, "temperature": 0}}', "line 2: .*which is greedy"),
        ('{"prompt": "\\ud800"}', "line 2: .*surrogate"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, match: str) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n' + line + "\n")
    with pytest.raises(UserError, match=match):  # before the model is looked for
        generate_command(tmp_path / "none", prompts_file=tmp_path / "in.jsonl")


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("one\ntwo\n",))
    writer.start()
    requests = Requests([], pipe, Settings())
    writer.join()
    assert [request.prompts for request in requests] == [("one",), ("two",)] == [r.prompts for r in requests]


def test_all_bad_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "\xff"}\n' + b"{\n" * 7)
    with pytest.raises(UserError) as error:
        Requests([], tmp_path / "in.jsonl", Settings())
    text = str(error.value)
    assert "line 1: not UTF-8" in text
    assert "line 5: not JSON" in text
    assert "line 6" not in text
    assert "3 more" in text


@pytest.mark.parametrize(("sample", "expected"), [(False, 0.0), (True, 1.0), (None, 0.0)])
def test_do_sample(sample: bool | None, expected: float) -> None:
    assert Settings(temperature=0).changed({"do_sample": sample}).temperature == expected
    assert Settings(temperature=0.7).changed({"do_sample": True}).temperature == 0.7


def test_what_a_prompt_gets_does_not_depend_on_its_neighbours(make_model, exported: Path, tmp_path: Path) -> None:
    _, tokenizer = load(exported)
    model = make_model().double()  # in float32, batches of another shape round differently
    requests = Requests([], many(tmp_path / "in.jsonl", 12), Settings(max_new_tokens=8, temperature=1.2))

    def run(batch_size: int) -> list[dict[str, Any]]:
        return [as_json(*pair) for pair in Answering(model, tokenizer, seed=3, batch_size=batch_size).answer(requests)]

    assert run(1) == run(3) == run(16)
    assert [line["id"] for line in run(3)] == list(range(12))


def test_learned_positions(make_model, exported: Path, tmp_path: Path) -> None:
    """64 of them: what fits alone is answered, whatever it runs beside; what does not is named before anything runs."""
    _, tokenizer = load(exported)
    answering = Answering(make_model(attn_config={"alibi": False}), tokenizer)
    long = {"prompt": "x" * 50, "parameters": {"max_new_tokens": 10}}
    short = {"prompt": "x", "parameters": {"max_new_tokens": 60}}
    fits = Requests([], write(tmp_path / "in.jsonl", long, short, long), Settings())
    answering.check(fits)
    assert [len(a.tokens) for _, (a,) in answering.answer(fits) if not a.finished] == [10, 60, 10]
    too_long = {**long, "parameters": short["parameters"]}
    with pytest.raises(UserError, match=r"line 2: \d+ prompt tokens \+ 60 new ones do not fit"):
        answering.check(Requests([], write(tmp_path / "in.jsonl", short, too_long), Settings()))


def test_a_stop_text_ends_an_answer(exported: Path) -> None:
    (free,) = generate_command(exported, ["the quick"], max_new_tokens=40, temperature=0)
    stop = free.text[10:13]
    (stopped,) = generate_command(exported, ["the quick"], max_new_tokens=40, temperature=0, stop=["@@@@", stop])
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finished
    assert len(stopped.tokens) < len(free.tokens)


def test_an_empty_prompt_without_an_end_of_text_is_named(exported: Path, tmp_path: Path) -> None:
    model, tokenizer = load(exported)
    tokenizer.eos_token = None
    source = write(tmp_path / "in.jsonl", {"prompt": "x"}, {"prompt": ""})
    with pytest.raises(UserError, match=r"line 2: an empty prompt needs"):
        Answering(model, tokenizer).check(Requests([], source, Settings()))


class TestResuming:
    """Interrupted anywhere, the same command writes the same bytes."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        return many(tmp_path / "in.jsonl", 24)

    def run(self, exported: Path, source: Path, target: Path, **changes: Any) -> bytes:
        settings: dict[str, Any] = {"max_new_tokens": 4, "temperature": 1.1, "batch_size": 2, "seed": 4, **changes}
        generate_command(exported, prompts_file=source, output=target, **settings)
        return target.read_bytes()

    @pytest.mark.parametrize("n_bytes", [0, 1, 1500, "cut", "whole"])
    def test_any_beginning_is_continued(
        self, exported: Path, source: Path, tmp_path: Path, n_bytes: int | str, capsys
    ) -> None:
        whole = self.run(exported, source, tmp_path / "whole.jsonl")
        target = tmp_path / "out.jsonl"
        with pytest.MonkeyPatch.context() as patch:  # leaves the record of an interrupted job
            patch.setattr(batch, "steps", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                self.run(exported, source, target)
        assert not target.exists()
        end = {"cut": whole.index(b"\n", 1200) + 1, "whole": len(whole)}.get(n_bytes, n_bytes)
        (tmp_path / "out.jsonl.partial").write_bytes(whole[:end])
        capsys.readouterr()
        assert self.run(exported, source, target) == whole
        assert ("are answered; going on" in capsys.readouterr().err) == (end > 1)
        assert not (tmp_path / "out.jsonl.partial").exists()

    def test_what_is_answered_is_not_computed_again(
        self, exported: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, tokenizer = load(exported)
        requests = Requests([], source, Settings(max_new_tokens=4))
        ran: list[int] = []
        original = batch.steps

        def counting(decoder: Any, rows: Any, **options: Any) -> Any:
            ran.append(len(rows))
            return original(decoder, rows, **options)

        monkeypatch.setattr(batch, "steps", counting)
        answering = Answering(model, tokenizer, batch_size=2)
        everything = [as_json(*pair) for pair in answering.answer(requests)]
        n_all = sum(ran)
        ran.clear()
        assert [as_json(*pair) for pair in answering.answer(requests, done=20)] == everything[20:]
        assert sum(ran) <= n_all / 3

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"seed": 5}, r"seed \(was 4, is 5\)"),
            ({"temperature": 0.5}, r"temperature \(was 1.1, is 0.5\)"),
            ({"batch_size": 3}, "batch_size"),
            ({"dtype": "bfloat16"}, "dtype"),
        ],
    )
    def test_another_job_is_refused(
        self, exported: Path, source: Path, tmp_path: Path, change: dict[str, Any], match: str
    ) -> None:
        target = tmp_path / "out.jsonl"
        before = self.run(exported, source, target)
        with pytest.raises(UserError, match=match):
            self.run(exported, source, target, **change)
        assert target.read_bytes() == before
        again = self.run(exported, source, target, **change, overwrite=True)
        assert (again != before) or "batch_size" in change or "dtype" in change  # which may change nothing here

    def test_another_input_and_another_model_are_refused(
        self, exported: Path, source: Path, tmp_path: Path, tokenizer: Path, make_model
    ) -> None:
        target = tmp_path / "out.jsonl"
        self.run(exported, source, target)
        original = source.read_bytes()
        source.write_bytes(original + b'{"prompt": "one more"}\n')
        with pytest.raises(UserError, match="something else: input"):
            self.run(exported, source, target)
        source.write_bytes(original)
        model = make_model()
        model.transformer.norm_f.weight.data[3] += 0.5
        write_hf_folder(exported, model.config, model.state_dict(), dtype="float32", tokenizer=tokenizer)
        with pytest.raises(UserError, match="something else: weights"):
            self.run(exported, source, target)

    def test_a_complete_output_is_left_alone_and_a_stranger_is_not_replaced(
        self, exported: Path, source: Path, tmp_path: Path, capsys
    ) -> None:
        target = tmp_path / "out.jsonl"
        target.write_text("precious\n")
        with pytest.raises(UserError, match="nothing says what it was made of"):
            self.run(exported, source, target)
        self.run(exported, source, target, overwrite=True)
        stamp = target.stat().st_mtime_ns
        self.run(exported, source, target)
        assert target.stat().st_mtime_ns == stamp
        assert "complete already" in capsys.readouterr().err

    def test_the_place_of_the_model_does_not_matter(self, exported: Path, source: Path, tmp_path: Path, capsys) -> None:
        self.run(exported, source, tmp_path / "out.jsonl")
        self.run(exported.rename(tmp_path / "moved"), source, tmp_path / "out.jsonl")
        assert "complete already" in capsys.readouterr().err

    def test_the_prompts_are_not_the_output(self, exported: Path, source: Path) -> None:
        with pytest.raises(UserError, match="is the file with the prompts"):
            self.run(exported, source, source)

    def test_a_full_disk_is_said_and_the_job_goes_on(self, exported: Path, source: Path, tmp_path: Path) -> None:
        whole = self.run(exported, source, tmp_path / "whole.jsonl")
        target = tmp_path / "out.jsonl"
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # writing beyond it fails, as on a full disk
        try:
            with pytest.raises(UserError, match=r"out\.jsonl\.partial: cannot be written: File too large.*goes on"):
                self.run(exported, source, target)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not target.exists()
        assert self.run(exported, source, target) == whole

    def test_an_input_that_is_edited_meanwhile_completes_nothing(
        self, exported: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = batch.steps

        def editing(*arguments: Any, **options: Any) -> Any:
            many(source, 25)
            source.write_text(source.read_text().replace('"id": 23', '"id": 32'))
            return original(*arguments, **options)

        monkeypatch.setattr(batch, "steps", editing)
        with pytest.raises(UserError, match="has changed while it was read"):
            self.run(exported, source, tmp_path / "out.jsonl")
        assert not (tmp_path / "out.jsonl").exists()

    def test_a_folder_is_no_output(self, exported: Path, source: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="is a folder"):
            self.run(exported, source, tmp_path, overwrite=True)

    def command(self, exported: Path, source: Path, target: Path) -> list[str]:
        """`run`, as a process of its own."""
        code = (
            "from pathlib import Path; from llmtrain.generation.command import generate_command\n"
            f"generate_command(Path({str(exported)!r}), prompts_file=Path({str(source)!r}), max_new_tokens=4,"
            f" temperature=1.1, batch_size=2, seed=4, output=Path({str(target)!r}))"
        )
        return [sys.executable, "-c", code]

    def test_killed_in_the_middle(self, exported: Path, tmp_path: Path) -> None:
        """Greedy and sampled lines."""
        source = many(tmp_path / "in.jsonl", 90)
        whole = self.run(exported, source, tmp_path / "whole.jsonl")
        target = tmp_path / "out.jsonl"
        partial = tmp_path / "out.jsonl.partial"
        child = subprocess.Popen(self.command(exported, source, target), stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while not (partial.exists() and partial.stat().st_size > 3000) and time.monotonic() < deadline:
            assert child.poll() is None, "it ended before it was killed"
            time.sleep(0.005)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert not target.exists()
        assert 0 < len(partial.read_bytes()) < len(whole)
        assert self.run(exported, source, target) == whole

    @pytest.mark.slow
    @pytest.mark.long
    def test_killed_again_and_again(self, exported: Path, tmp_path: Path) -> None:
        """Each time a little later, until it gets through."""
        source = many(tmp_path / "in.jsonl", 400)
        whole = self.run(exported, source, tmp_path / "whole.jsonl")
        target, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
        kills = 0
        while not target.exists():
            more = (partial.stat().st_size if partial.exists() else 0) + len(whole) // 4 + 17
            child = subprocess.Popen(self.command(exported, source, target), stderr=subprocess.DEVNULL)
            while child.poll() is None and not (partial.exists() and partial.stat().st_size > more):
                time.sleep(0.002)
            if child.poll() is None:
                os.kill(child.pid, signal.SIGKILL)
                kills += 1
            assert child.wait() in (0, -signal.SIGKILL)
        assert kills >= 2
        assert target.read_bytes() == whole
