import json

import pytest

from llmtrain.data.finetuning.config import FinetuningLoaderConfig
from llmtrain.data.finetuning.loader import build_finetuning_loader
from llmtrain.tokenizer import TokenizerConfig, load_tokenizer


def chat(number, words=None):
    """A conversation whose answer tells which one it is."""
    words = 3 + number * 7 % 40 if words is None else words
    return {
        "messages": [
            {"role": "user", "content": f"Say {number}."},
            {"role": "assistant", "content": f"{number}: " + "yes " * words + "done"},
        ]
    }


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def chat_tokenizer(corpus):
    return load_tokenizer(TokenizerConfig(name=str(corpus.tokenizer), chat_template="chatml"))


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """120 conversations of different lengths."""
    return write_rows(tmp_path_factory.mktemp("chats") / "chats.jsonl", [chat(number) for number in range(120)])


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def build(chat_tokenizer, chats, cache):
    """Make a loader over the conversations; keywords are keys of the dataset, but for a few of the loader's own."""

    def make(
        batch_size=4, workers=0, drop_last=False, evaluation=False, epoch_batches=None, vocab_size=4096, **dataset
    ):
        if not dataset.keys() & {"files", "hf_name", "local", "remote", "streams"}:
            dataset["files"] = str(chats)
        data = {"max_seq_len": 128, "cache_dir": str(cache), **dataset}
        cfg = {"dataset": data, "num_workers": workers, "drop_last": drop_last, "timeout": 60}
        return build_finetuning_loader(
            FinetuningLoaderConfig.model_validate(cfg),
            tokenizer=chat_tokenizer,
            vocab_size=vocab_size,
            device_batch_size=batch_size,
            evaluation=evaluation,
            epoch_batches=epoch_batches,
        )

    return make
