"""`make train` and `make twins` as a newcomer meets them, from raw text to a model that chats. And killed half-way.

Everything is real. The runs are shorter than their recipes say: the first a tenth, the others a few steps, and in the
long tests again as long as they need to learn: the first half as long.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint.export import export
from llmtrain.prep.run import prepare
from llmtrain.testing.launch import Finished, Run, launch, launcher_environment, read_metric
from llmtrain.testing.state import same_state

pytestmark = [pytest.mark.slow, pytest.mark.gloo_training]

PROMPT = "def __init__(self"
ASKED = [
    *("json.dumps", "shutil.copytree", "random.choice", "os.path.join", "re.compile", "argparse.ArgumentParser"),
    *("math.sqrt", "json.load", "time.sleep", "socket.socket", "textwrap.wrap", "copy.deepcopy"),
]
STEPS = 60
FEW = ["max_duration=6ba", "eval_interval=6ba"]
RECIPES = {"instruct": "yamls/mpt-tiny-instruct.yaml", "chat": "yamls/mpt-tiny-chat.yaml"}
BEFORE_AN_ANSWER = {"instruct": "### Response:", "chat": "<|im_start|>assistant"}
ROWS = {"instruct": 4096, "chat": 4224}  # of the embedding: chat's is grown, to a multiple of 128


def make(target: str, folder: Path, *options: str) -> str:
    """Runs a target of the Makefile with this Python's environment instead of a new one."""
    done = subprocess.run(
        ["make", *options, "-o", "setup", target, f"VENV={Path(sys.executable).parent.parent}"],
        cwd=folder,
        env=launcher_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2400,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def checkout(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make twins` needs of the repository, with nothing made yet."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("Makefile", "train.py", "yamls", "data_prep"):
        source = repository / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    return folder


@pytest.fixture(scope="module")
def first(checkout: Path) -> str:
    """The output of the first `make train`."""
    return make("train", checkout, f"OVERRIDES=max_duration={STEPS}ba")


@pytest.fixture(scope="module")
def learned(checkout: Path, first: str) -> Finished:
    """The same recipe, half as long as it says."""
    run = launch(checkout / "yamls/mpt-tiny.yaml", ["run_name=learned", "max_duration=280ba"], ranks=2, cwd=checkout)
    assert run.code == 0, run.output
    return run


def tune(checkout: Path, prefix: str, base: str, **overrides: list[str]) -> dict[str, Finished]:
    """What `make twins` does after `make train`, in processes that need not import everything anew."""
    runs = {}
    for name in overrides:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(checkout)
            prepare(Path(f"data_prep/tiny-{name}.yaml"))
            changes = [f"run_name={prefix}-{name}", f"variables.base={base}", *overrides[name]]
            runs[name] = launch(checkout / RECIPES[name], changes, ranks=2, cwd=checkout)
            assert runs[name].code == 0, runs[name].output
            export(runs[name].folder, runs[name].folder / "export")
            base = f"runs/{prefix}-{name}"
    return runs


@pytest.fixture(scope="module")
def begun(checkout: Path, first: str) -> dict[str, Finished]:
    """The first of the fine-tuning runs, after a few steps."""
    return tune(checkout, "begun", "runs/mpt-tiny", instruct=FEW)


@pytest.fixture(scope="module")
def begun_chat(checkout: Path, begun: dict[str, Finished]) -> dict[str, Finished]:
    """The second, which starts from it, after as few."""
    return tune(checkout, "begun", "runs/begun-instruct", chat=FEW)


@pytest.fixture(scope="module")
def tuned(checkout: Path, learned: Finished) -> dict[str, Finished]:
    """The fine-tuning runs, long enough to learn something after half a base run."""
    return tune(checkout, "tuned", "runs/learned", instruct=["max_duration=1ep"], chat=["max_duration=2ep"])


def test_make_twins_goes_on_with_these_recipes(checkout: Path) -> None:
    steps = [line for line in make("twins", checkout, "-n").splitlines() if line.startswith("/")]
    after = steps[next(i for i, step in enumerate(steps) if "data_prep/tiny-instruct.yaml" in step) :]
    for name, three in zip(RECIPES, (after[:3], after[3:6]), strict=True):
        assert f"llmtrain prep data_prep/tiny-{name}.yaml" in three[0]
        assert f"composer -n 2 train.py {RECIPES[name]}" in three[1]
        assert f"llmtrain export runs/mpt-tiny-{name} runs/mpt-tiny-{name}/export" in three[2]


def test_validation_loss_falls_from_that_of_a_guess(checkout: Path, first: str) -> None:
    losses = read_metric(checkout / "runs/mpt-tiny", "metrics/eval/LanguageCrossEntropy")
    assert sorted(losses) == [0, STEPS]
    assert losses[0] == pytest.approx(math.log(4096), abs=0.1)
    assert losses[STEPS] < losses[0] - 1.5, losses


@pytest.mark.long
def test_validation_loss_falls_clearly_below_the_unigram_entropy(checkout: Path, learned: Finished) -> None:
    entropy = json.loads((checkout / "data/tiny/prep.json").read_text())["splits"]["val"]["unigram_entropy_nats"]
    losses = learned.metrics("metrics/eval/LanguageCrossEntropy")
    assert losses[max(losses)] < entropy - 1.0, f"{losses} against {entropy}"


def test_it_shows_progress_rate_and_time_left(first: str) -> None:
    lines = [line for line in first.splitlines() if line.startswith("train       step")]
    assert len(lines) == STEPS // 10
    assert all("loss" in line and "tokens/s" in line and "left" in line for line in lines)


def test_it_leaves_the_run_folder(checkout: Path, first: str) -> None:
    run = checkout / "runs/mpt-tiny"
    assert {path.name for path in run.iterdir()} >= {
        "recipe.yaml",
        "metrics.jsonl",
        "loss.png",
        "checkpoints",
        "export",
    }
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "checkpoints/latest").resolve().name == f"ep0-ba{STEPS}"


def test_it_prints_text_that_continues_the_prompts(first: str) -> None:
    assert PROMPT in first


def test_the_export_opens_in_plain_transformers_and_writes_the_same_tokens(checkout: Path, first: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmtrain.checkpoint.resolve import locate
    from llmtrain.generation.generate import generate
    from llmtrain.generation.load import load
    from llmtrain.generation.sampling import Sampling

    run = checkout / "runs/mpt-tiny"
    ours, tokenizer = load(locate(run), device="cpu", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(run / "export", trust_remote_code=False).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(run / "export", trust_remote_code=False)
    ids = tokenizer(PROMPT)["input_ids"]
    assert their_tokenizer(PROMPT)["input_ids"] == ids
    with torch.no_grad():
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False, eos_token_id=None)
    found = generate(ours, [ids], max_new_tokens=32, sampling=Sampling(temperature=0))
    assert list(found[0]) == expected[0, len(ids) :].tolist()


@pytest.fixture
def fine_tuned(request: pytest.FixtureRequest, name: str) -> Finished:
    """One of the two; the second is made in the long tests alone."""
    run: Finished = request.getfixturevalue("begun" if name == "instruct" else "begun_chat")[name]
    return run


ONE_IN_THE_GATE = pytest.mark.parametrize("name", ["instruct", pytest.param("chat", marks=pytest.mark.long)])


@ONE_IN_THE_GATE
def test_fine_tuning_shows_what_is_trained_and_what_it_learns(fine_tuned: Finished) -> None:
    run = fine_tuned
    shown = (run.folder / "first_batch.txt").read_text()
    assert shown.count("\nRow ") == 4  # of rank 0: half of the global batch
    # The console shows the first two rows, long spans without their middle.
    heads = [line for line in shown.partition("\n\nRow 3 of")[0].splitlines() if line.startswith(("Row", "  Example"))]
    assert len(heads) >= 4
    assert [line for line in heads if line not in run.output] == []
    trained = [line for line in shown.splitlines() if line.startswith(" train | ")]
    assert any(line in run.output for line in trained)
    samples = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {0, 6}
    losses = run.metrics("metrics/eval/LanguageCrossEntropy")
    assert losses[6] < losses[0]


@ONE_IN_THE_GATE
def test_plain_transformers_holds_a_conversation(fine_tuned: Finished, name: str) -> None:
    answer, _ = next(answers(fine_tuned, name))
    assert 0 < len(answer) <= 100


@pytest.mark.long
@pytest.mark.parametrize("name", RECIPES)
def test_fine_tuning_lowers_the_loss_of_held_out_answers(tuned: dict[str, Finished], name: str) -> None:
    """Against the model that it starts from, on the same tokens."""
    losses = tuned[name].metrics("metrics/eval/LanguageCrossEntropy")
    assert min(losses) == 0
    assert losses[max(losses)] < losses[0] - 0.7, losses


@pytest.mark.long
@pytest.mark.parametrize("name", RECIPES)
def test_fine_tuned_models_end_their_answers(tuned: dict[str, Finished], name: str) -> None:
    ended = sum(came_to_an_end for _, came_to_an_end in answers(tuned[name], name))
    # So small a model repeats itself on some; one that has not learned to stop does so on all.
    assert ended >= len(ASKED) / 2


def answers(run: Finished, name: str) -> Iterator[tuple[list[int], bool]]:
    """What plain transformers answers to each question, and whether it came to an end within 100 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.folder / "export", trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(run.folder / "export", trust_remote_code=False).eval()
    assert model.config.vocab_size == ROWS[name]
    stops = (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    for function in ASKED:
        question = [{"role": "user", "content": f"What does `{function}` do?"}]
        text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        assert text.rstrip().endswith(BEFORE_AN_ANSWER[name])
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            answer = model.generate(ids, max_new_tokens=100, do_sample=False)[0, ids.shape[1] :].tolist()
        yield answer, len(answer) < 100 and answer[-1] in stops


@pytest.mark.long
def test_nothing_that_is_done_is_done_again(checkout: Path, first: str) -> None:
    files = [path for path in checkout.rglob("*") if path.is_file() and not path.is_symlink()]
    before = {path: path.stat().st_mtime_ns for path in files}
    again = make("train", checkout, f"OVERRIDES=max_duration={STEPS}ba")
    assert f"mpt-tiny is complete at step {STEPS}" in again
    assert "already" in again
    assert {path: path.stat().st_mtime_ns for path in files} == before


@pytest.mark.long
def test_killed_half_way_the_tiny_recipe_ends_with_the_same_weights(checkout: Path, first: str) -> None:
    """The recipe of `make train` itself, shortened, on its real data."""
    recipe = checkout / "yamls/mpt-tiny.yaml"
    short = ["max_duration=24ba", "save_interval=6ba", "eval_interval=8ba", "console_log_interval=1ba"]
    whole = launch(recipe, [*short, "run_name=whole"], ranks=2, cwd=checkout)
    assert whole.code == 0, whole.output
    killed = Run(recipe, [*short, "run_name=killed"], ranks=2, cwd=checkout)
    killed.wait_for("checkpoints/ep0-ba12 ")  # written beside the steps that follow
    killed.send(signal.SIGKILL)
    assert killed.wait().codes == (-signal.SIGKILL, -signal.SIGKILL)
    again = launch(recipe, [*short, "run_name=killed"], ranks=2, cwd=checkout)
    assert again.code == 0, again.output
    assert "continues after step 12" in again.output
    assert whole.metrics("loss/train/total") == again.metrics("loss/train/total")
    name = "checkpoints/ep0-ba24"
    assert same_state(whole.folder / name, again.folder / name) >= 20 * 4  # value, two moments, step count


@pytest.mark.long
def test_sigterm_stops_the_launcher_and_the_run_continues(checkout: Path, first: str) -> None:
    """SIGTERM to the real launcher, as a scheduler sends it."""
    from llmtrain.testing.launch import launcher_command

    few = ["max_duration=10ba", "scheduler.t_warmup=2ba", "console_log_interval=1ba", "eval_first=false"]
    overrides = ["run_name=stopped", *few]
    command = launcher_command(checkout / "yamls/mpt-tiny.yaml", overrides, ranks=2)
    process = subprocess.Popen(
        command, cwd=checkout, env=launcher_environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("train       step 2 "):
            os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=600) == 143, "".join(lines)
    stopped = [line for line in lines if "SIGTERM: stopped after step" in line]
    assert len(stopped) == 1, "".join(lines)
    again = launch(checkout / "yamls/mpt-tiny.yaml", overrides, ranks=2, cwd=checkout)
    assert again.code == 0, again.output
    assert "continues after step" in again.output
