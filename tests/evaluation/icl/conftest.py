"""A tiny model and a tokenizer for tests of tasks."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from llmtrain.evaluation.icl.config import ICLConfig
from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.tokenizer import TokenizerConfig, load_tokenizer

SHIPPED = "yamls/eval/icl"


def tiny_model(vocab_size: int, seed: int = 3) -> MPT:
    """Two layers, weights large enough that answers differ."""
    torch.manual_seed(seed)
    shape = {"d_model": 48, "n_heads": 3, "n_layers": 2, "vocab_size": vocab_size, "max_seq_len": 64}
    model = MPT(MPTConfig.model_validate({**shape, "attn_config": {"alibi": True}})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.fixture(scope="session")
def words(corpus: TinyCorpus) -> PreTrainedTokenizerFast:
    return load_tokenizer(TokenizerConfig(name=str(corpus.tokenizer)))


@pytest.fixture(scope="session")
def model(corpus: TinyCorpus) -> MPT:
    return tiny_model(corpus.vocab_size)


@pytest.fixture
def shipped(repository, monkeypatch: pytest.MonkeyPatch) -> ICLConfig:
    """The tasks that the repository has, one of each type, with every metric."""
    monkeypatch.chdir(repository)
    cfg = ICLConfig(icl_tasks=f"{SHIPPED}/tasks.yaml", eval_gauntlet=f"{SHIPPED}/gauntlet.yaml", icl_seq_len=96)
    every = {
        "language_modeling": ("InContextLearningLMAccuracy", "InContextLearningLMExpectedCalibrationError"),
        "multiple_choice": (
            "InContextLearningMultipleChoiceAccuracy",
            "InContextLearningMCExpectedCalibrationError",
        ),
    }
    tasks = tuple(task.model_copy(update={"metric_names": every.get(task.icl_task_type)}) for task in cfg.icl_tasks)
    return cfg.model_copy(update={"icl_tasks": tasks})
