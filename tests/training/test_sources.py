"""What a run took from each source of a mixture, and the loss of each: on any number of ranks, and after a resume."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Logger, State
from composer.core import DataSpec
from composer.devices import DeviceCPU
from composer.loggers import LoggerDestination

from llmtrain.data.batch import tokens_in_batch
from llmtrain.data.config import TextLoaderConfig
from llmtrain.data.text import build_text_loader
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import Finished, launch
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.training.length_warmup import cut
from llmtrain.training.loss_curve import draw_loss_curve
from llmtrain.training.sources import SourceShares, source_callbacks

STEPS, BATCH = 12, 8
SHARES = [f"data/{source}/{what}" for source in ("big", "little") for what in ("share", "token_share", "epochs")]


def loader_block(corpus: TinyCorpus, **dataset: Any) -> dict[str, Any]:
    streams = {
        "big": {"local": str(corpus.train), "proportion": 3},
        "little": {"local": str(corpus.val), "proportion": 1},
    }
    dataset = {"streams": streams, "shuffle": True, "max_seq_len": 64, **dataset}
    return {"name": "text", "num_workers": 0, "dataset": dataset}


@pytest.fixture(scope="module")
def recipe(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without dropout, and with four heads: it also runs on ranks that share sequences."""
    both = {"little": {"local": str(corpus.val)}, "big": {"local": str(corpus.train), "choose": 21}}
    alone = [
        {"name": "text", "label": name, "num_workers": 0, "dataset": {"streams": {name: both[name]}}} for name in both
    ]
    mixture = {"name": "text", "label": "both", "num_workers": 2, "dataset": {"streams": both}}
    return tiny_recipe(
        tmp_path_factory.mktemp("sources") / "sources.yaml",
        corpus,
        model={
            "name": "mpt_causal_lm",
            "d_model": 48,
            "n_heads": 4,
            "n_layers": 2,
            "vocab_size": corpus.vocab_size,
            "init_device": "mixed",
            "attn_config": {"alibi": True},
        },
        train_loader=loader_block(corpus),
        eval_loader=[mixture, *alone],
        eval_subset_num_batches=-1,
        eval_interval=f"{STEPS}ba",
        save_interval="6ba",
        max_duration=f"{STEPS}ba",
    )


@pytest.fixture(scope="module")
def one(recipe: Path) -> Finished:
    run = launch(recipe, ["run_name=one"], cwd=recipe.parent)
    assert run.code == 0, run.output
    return run


def counted(corpus: TinyCorpus, steps: int) -> list[int]:
    """Rows of each stream in the first batches, by the loader itself."""
    loader = make_loader(corpus)
    numbers = torch.cat([batch["stream_id"] for batch, _ in zip(loader, range(steps), strict=False)])
    return torch.bincount(numbers, minlength=2).tolist()


def make_loader(corpus: TinyCorpus) -> Any:
    return build_text_loader(
        TextLoaderConfig.model_validate(loader_block(corpus)),
        eos_token_id=corpus.eos_token_id,
        tokenizer_fingerprint=corpus.tokenizer_fingerprint,
        vocab_size=corpus.vocab_size,
        device_batch_size=BATCH,
    )


@pytest.mark.slow
@pytest.mark.gloo_training
def test_shares_are_those_of_the_samples_so_far(one: Finished, corpus: TinyCorpus) -> None:
    assert list(one.metrics("data/big/share")) == [1, 10, 12]
    for step, share in one.metrics("data/big/share").items():
        big, little = counted(corpus, step)
        assert share == pytest.approx(big / (big + little))
        assert one.metrics("data/little/token_share")[step] == pytest.approx(little / (big + little))
        rows = json.loads((corpus.val / "index.json").read_text())["shards"]
        assert one.metrics("data/little/epochs")[step] * sum(s["samples"] for s in rows) == pytest.approx(little)
    assert one.metrics("data/big/wanted_share")[1] == pytest.approx(0.75, abs=0.01)


@pytest.mark.slow
@pytest.mark.gloo_training
@pytest.mark.parametrize(
    "overrides",
    [[], pytest.param(["sequence_parallel_degree=2"], marks=pytest.mark.long)],
    ids=["two ranks", "a shared sequence"],
)
def test_two_ranks_count_and_measure_what_one_does(one: Finished, recipe: Path, overrides: list[str]) -> None:
    run = launch(recipe, ["run_name=two", "save_folder=null", *overrides], ranks=2, cwd=recipe.parent)
    assert run.code == 0, run.output
    for key in SHARES:
        assert run.metrics(key) == one.metrics(key), key
    for name in ("big", "little"):
        key = f"metrics/eval/both/{name}/LanguageCrossEntropy"
        assert run.metrics(key) == pytest.approx(one.metrics(key), rel=1e-4)
    assert_each_source_is_as_alone(run)


def assert_each_source_is_as_alone(run: Finished) -> None:
    for name in ("big", "little"):
        within = run.metrics(f"metrics/eval/both/{name}/LanguageCrossEntropy")
        alone = run.metrics(f"metrics/eval/{name}/LanguageCrossEntropy")
        assert list(within) == [STEPS]
        assert within == pytest.approx(alone, rel=1e-6)


@pytest.mark.slow
@pytest.mark.gloo_training
@pytest.mark.parametrize("batch_size", [4, pytest.param(5, marks=pytest.mark.long)])
def test_loss_of_a_source_is_that_of_an_evaluation_on_it_alone(one: Finished, recipe: Path, batch_size: int) -> None:
    run = one
    if batch_size != 4:
        settings = ["run_name=other", "save_folder=null", f"device_eval_batch_size={batch_size}"]
        run = launch(recipe, settings, cwd=recipe.parent)
    assert_each_source_is_as_alone(run)
    assert not run.metrics("metrics/eval/big/big/LanguageCrossEntropy")  # one source is no mixture


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.gloo_training
def test_a_resumed_run_goes_on_counting(one: Finished, recipe: Path) -> None:
    first = launch(recipe, ["run_name=resumed", "max_duration=6ba"], cwd=recipe.parent)
    assert first.code == 0, first.output
    run = launch(recipe, ["run_name=resumed"], ranks=2, cwd=recipe.parent)
    assert run.code == 0, run.output
    for key in SHARES:
        after = {step: value for step, value in run.metrics(key).items() if step > 6}
        assert after == {10: one.metrics(key)[10], 12: one.metrics(key)[12]}, key


def test_a_growing_length_counts_samples_once_and_tokens_as_they_are(corpus: TinyCorpus) -> None:
    loader = make_loader(corpus)
    pieces = 64 // 16
    spec = DataSpec(
        loader,
        get_num_samples_in_batch=lambda batch: len(batch["input_ids"]) // pieces,
        get_num_tokens_in_batch=tokens_in_batch,
    )
    shares = SourceShares(spec)
    batch = next(iter(loader))
    expected = torch.bincount(batch["stream_id"], minlength=2)
    short, n = cut(batch, 16)
    assert n == pieces
    assert shares._count(short).tolist() == [expected.tolist(), (expected * 64).tolist()]


def test_no_mixture_no_callbacks(corpus: TinyCorpus) -> None:
    cfg = TextLoaderConfig.model_validate(
        {"num_workers": 0, "dataset": {"local": str(corpus.train), "max_seq_len": 64}}
    )
    loader = build_text_loader(
        cfg,
        eos_token_id=corpus.eos_token_id,
        tokenizer_fingerprint=corpus.tokenizer_fingerprint,
        vocab_size=corpus.vocab_size,
        device_batch_size=BATCH,
    )
    assert "stream_id" not in next(iter(loader))
    assert source_callbacks(DataSpec(loader), []) == []


def test_a_changed_mixture_keeps_the_counts_of_the_sources_that_stay(corpus: TinyCorpus) -> None:
    shares = SourceShares(DataSpec(make_loader(corpus)))
    shares.load_state_dict({"seen": json.dumps({"gone": [5, 320], "little": [3, 192]})})
    assert json.loads(shares.state_dict()["seen"]) == {"big": [0, 0], "little": [3, 192]}
    assert shares.metrics()["data/little/share"] == 1


class Lines(LoggerDestination):
    def __init__(self) -> None:
        self.lines: list[tuple[int, float]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        assert step is not None
        self.lines.append((step, metrics["data/big/share"]))


def test_the_end_is_logged_whatever_the_length_is_counted_in(corpus: TinyCorpus) -> None:
    """Of a length in epochs the last batch does not look like the last."""
    loader = make_loader(corpus)
    shares, logged = SourceShares(DataSpec(loader)), Lines()
    state = State(model=torch.nn.Linear(1, 1), rank_zero_seed=0, run_name="r", device=DeviceCPU(), max_duration="1ep")
    logger = Logger(state, destinations=[logged])
    for batch, _ in zip(loader, range(13), strict=False):
        state.batch = batch
        state.timestamp = state.timestamp.to_next_batch(BATCH)
        shares.batch_end(state, logger)
    state.timestamp = state.timestamp.to_next_epoch()
    shares.fit_end(state, logger)
    shares.fit_end(state, logger)
    assert [step for step, _ in logged.lines] == [1, 10, 13]
    big, little = counted(corpus, 13)
    assert logged.lines[-1][1] == pytest.approx(big / (big + little))


@pytest.mark.parametrize("sources", [3, 40])
def test_the_picture_shows_sources_while_it_stays_readable(
    sources: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *args, **kw: (drawn.append(kw.get("label")), plot(*args, **kw))[1])
    row = {f"metrics/eval/source{i}/LanguageCrossEntropy": 3 + i / 10 for i in range(sources)}
    rows = [{"step": step, "metrics/eval/LanguageCrossEntropy": 4.0, **row} for step in (5, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    draw_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert len(drawn) == (4 if sources == 3 else 1)
