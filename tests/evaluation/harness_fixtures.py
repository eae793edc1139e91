"""A tiny trained model with its export, and tasks in the harness's own YAML on local files."""

import itertools
import json
import random
import re
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
import yaml

from llmtrain.checkpoint.hugging_face import write_hf_folder
from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT
from llmtrain.testing.corpus import TinyCorpus

LENGTH = 96
CONFIG = {
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": LENGTH,
    "vocab_size": 512,
    "no_bias": True,
    "attn_config": {"alibi": True},
}

MULTIPLE_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
TASKS: dict[str, dict[str, Any]] = {
    # As HellaSwag and ARC: endings of several tokens after examples.
    "tiny_endings": {**MULTIPLE_CHOICE, "doc_to_text": "{{start}}", "num_fewshot": 2},
    # As MMLU: letters, one token each.
    "tiny_letters": {
        **MULTIPLE_CHOICE,
        "doc_to_text": "{{start}}\nA.{{choices[0]}}\nB.{{choices[1]}}\nC.{{choices[2]}}\nD.{{choices[3]}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
    },
    # As LAMBADA.
    "tiny_last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    # As WikiText: texts longer than the model reads at once.
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    # As GSM8K: an answer up to a stop string, of which a pattern is compared.
    "tiny_answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{start}}",
        "doc_to_target": "{{word}}",
        "generation_kwargs": {"until": [". ", ",", "\n\n"], "max_gen_toks": 12, "do_sample": False},
        "filter_list": [
            {"name": "word", "filter": [{"function": "regex", "regex_pattern": "([a-z]+)"}, {"function": "take_first"}]}
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def write_tasks(folder: Path, n: int = 24) -> None:
    """YAML files of TASKS, of a group of two of them, and their data."""
    drawn = random.Random(0)
    text = " ".join(" ".join(str(topics[name]).split()) for name in sorted(topics))
    sentences = [s for s in re.split(r"(?<=\.) ", text) if 60 < len(s) < 160 and s.isascii() and " the " in s[30:]]
    drawn.shuffle(sentences)

    def example(i: int) -> dict[str, Any]:
        words = [sentence.split() for sentence in sentences[4 * i : 4 * i + 4]]
        ends = [" ".join(w[len(w) // 2 :]) for w in words]
        label = drawn.randrange(4)
        ends[0], ends[label] = ends[label], ends[0]
        return {
            "start": " ".join(words[0][: len(words[0]) // 2]),
            "choices": ends,
            "label": label,
            "text": sentences[4 * i].rpartition(" the ")[0] + " the",
            "word": re.findall("[a-z]+", ends[label].lower() + " none")[0],
            "page": " ".join(sentences[4 * i : 4 * i + 1 + i % 5]),
        }

    for split, numbers in (("train", range(n, n + 8)), ("test", range(n))):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(example(i)) + "\n" for i in numbers))
    data = {"train": "train.jsonl", "test": "test.jsonl"}
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": data}, "fewshot_split": "train"}
    common |= {"test_split": "test", "fewshot_config": {"sampler": "default"}}
    for name, task in TASKS.items():
        block = {"task": name, **common, "metadata": {"version": 1.5}, **task}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(block, sort_keys=False))


def write_group(folder: Path, tasks: Path) -> None:
    """A group that averages two of the tasks, with absolute paths of their data."""
    folder.mkdir()
    for name in ("tiny_endings", "tiny_letters"):
        block = yaml.safe_load((tasks / f"{name}.yaml").read_text())
        block["dataset_kwargs"]["data_files"] = {s: str(tasks / f"{s}.jsonl") for s in ("train", "test")}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(block))
    group = {
        "group": "tiny_group",
        "task": ["tiny_endings", "tiny_letters"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
        "metadata": {"version": 2},
    }
    (folder / "group.yaml").write_text(yaml.safe_dump(group))


def train(corpus: TinyCorpus, steps: int = 80) -> MPT:
    """A model that knows a little of the corpus: some of its guesses are right, and none is a tie."""
    from llmtrain.evaluation.tokens import ShardTokens, folder_of_shards

    torch.manual_seed(0)
    model = MPT(MPTConfig.model_validate(CONFIG)).train()
    tokens = ShardTokens(folder_of_shards(corpus.train), vocab_size=512, fingerprints=None, key="")
    stream = torch.from_numpy(tokens.read(0, 0, tokens.pieces[0]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    places = np.random.default_rng(0)
    for _ in itertools.repeat(None, steps):
        starts = places.integers(0, len(stream) - 64, 8)
        ids = torch.stack([stream[s : s + 64] for s in starts])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def export(model: MPT, folder: Path, tokenizer: Path) -> None:
    """As transformers' own MPT."""
    folder.mkdir()
    write_hf_folder(folder, model.config, model.state_dict(), dtype="float32", tokenizer=tokenizer)
