"""Fixtures that several folders of tests share."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tests run beside each other on few cores; and nothing may try to reach a hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import torch

from llmtrain.garbage import importing
from llmtrain.testing.corpus import TinyCorpus, tiny_corpus
from llmtrain.testing.ranks import GLOO_AVERAGES_GRADIENTS
from llmtrain.testing.remote import s3_server

torch.set_num_threads(1)

REPOSITORY = Path(__file__).parent.parent
sys.path.append(str(REPOSITORY))  # ranks import the tests that start them by name; last, so an installed llmtrain wins


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that take long begin first, so that no worker is left with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name != "test_make_train.py", item.path not in slow))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Each worker imports all tests, and with them all of torch and Composer."""
    with importing():
        return (yield)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gloo_training") and not GLOO_AVERAGES_GRADIENTS:
        pytest.skip(f"torch {torch.__version__} sums gradients over gloo ranks: llmtrain refuses to train on several")


@pytest.fixture(autouse=True)
def _denormals_are_kept() -> None:
    """Commands that an earlier test ran in this process made it flush them; hypothesis then refuses to draw floats."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    """Real text, a tokenizer of 512 tokens, rows of 64 tokens."""
    return tiny_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE tokenizer as save_pretrained leaves it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    raw = ByteLevelBPETokenizer()
    raw.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog " * 20], 300, special_tokens=["<|endoftext|>"]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    raw.save(str(folder / "raw.json"))
    fast = PreTrainedTokenizerFast(tokenizer_file=str(folder / "raw.json"), eos_token="<|endoftext|>")
    (folder / "raw.json").unlink()
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """URL of an S3 endpoint that is empty where a module begins."""
    pytest.importorskip("moto")
    with s3_server() as url:
        yield url


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY
