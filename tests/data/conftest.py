import pytest

from llmtrain.data.config import TextLoaderConfig
from llmtrain.data.text import build_text_loader
from llmtrain.testing.corpus import TinyCorpus, tiny_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> TinyCorpus:
    return tiny_corpus(tmp_path_factory.mktemp("corpus") / "tiny", seq_len=32, vocab_size=320, max_bytes=60_000)


@pytest.fixture
def loader(corpus):
    """Make a loader over the tiny corpus; `build` goes to build_text_loader, the rest is the dataset's block."""
    made = []

    def make(batch_size=8, workers=0, fingerprint=None, vocab_size=None, drop_last=False, eos=0, build=None, **dataset):
        if "streams" not in dataset and "remote" not in dataset:
            dataset.setdefault("local", str(corpus.train))
        cfg = TextLoaderConfig.model_validate(
            {
                "dataset": {"max_seq_len": 32, "return_sample_ids": True, **dataset},
                "num_workers": workers,
                "drop_last": drop_last,
                "timeout": 60,
            }
        )
        made.append(
            build_text_loader(
                cfg,
                eos_token_id=eos,
                tokenizer_fingerprint=fingerprint or corpus.tokenizer_fingerprint,
                vocab_size=vocab_size or corpus.vocab_size,
                device_batch_size=batch_size,
                **(build or {}),
            )
        )
        return made[-1]

    yield make
    for loader in made:
        loader._stop_workers()
