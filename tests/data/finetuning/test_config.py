"""Recipes of llm-foundry load; what contradicts itself is named."""

import pytest
from pydantic import ValidationError

from llmtrain.data.finetuning.config import FinetuningLoaderConfig

# The keys of the loaders in llm-foundry's own fine-tuning recipes.
FOUNDRY = {
    "mpt-7b_dolly_sft": {
        "hf_name": "mosaicml/dolly_hhrlhf",
        "split": "train",
        "max_seq_len": 2048,
        "allow_pad_trimming": False,
        "decoder_only_format": True,
        "shuffle": True,
    },
    "mpt-30b-instruct": {
        "hf_name": "mosaicml/instruct-v3",
        "split": "train",
        "max_seq_len": 8192,
        "allow_pad_trimming": False,
        "decoder_only_format": True,
        "packing_ratio": 9,
        "shuffle": True,
    },
    "1b_local_data_sft": {
        "hf_name": "json",
        "hf_kwargs": {"data_dir": "scripts/train/finetune_example"},
        "preprocessing_fn": "finetune_example.preprocessing:multiple_choice",
        "split": "train",
        "max_seq_len": 2048,
        "decoder_only_format": True,
        "shuffle": True,
    },
    "streaming": {
        "remote": "s3://bucket/ift",
        "local": "/tmp/mds",
        "split": "train",
        "shuffle": True,
        "max_seq_len": 2048,
        "decoder_only_format": True,
        "packing_ratio": "auto",
        "num_canonical_nodes": 8,
        "shuffle_algo": "py1e",
        "predownload": 1000,
        "target_prompts": "length>=64",
        "target_responses": "ALL",
        "max_leftover_bins_to_keep": 1,
        "download_timeout": 120,
    },
}
LOADER = {"drop_last": True, "num_workers": 8, "pin_memory": False, "prefetch_factor": 2, "timeout": 0}


def dataset(**keys):
    block = {"max_seq_len": 64, **({} if keys.keys() & {"streams", "files", "hf_name", "local"} else {"files": "x"})}
    return FinetuningLoaderConfig.model_validate({"name": "finetuning", "dataset": {**block, **keys}}).dataset


@pytest.mark.parametrize("name", FOUNDRY)
def test_recipes_of_llm_foundry(name):
    FinetuningLoaderConfig.model_validate({"name": "finetuning", "dataset": FOUNDRY[name], **LOADER})


def test_what_has_no_effect_is_said():
    first, second = dataset(**FOUNDRY["streaming"]).notes()
    assert first == (
        "dataset: no effect here: max_leftover_bins_to_keep, shuffle_algo, num_canonical_nodes, predownload"
    )
    assert "packing_ratio: auto switches packing on" in second
    assert dataset().notes() == []


@pytest.mark.parametrize(
    ("keys", "packs"),
    [
        ({}, False),
        ({"packing": True}, True),
        ({"packing_ratio": "auto"}, True),
        ({"packing_ratio": 2.5}, True),
        ({"packing_ratio": 1.0}, False),
        ({"packing_ratio": None}, False),
    ],
)
def test_what_switches_packing_on(keys, packs):
    assert dataset(**keys).packs is packs


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hf_name": "a", "split": "train", "local": "b"}, r"hf_name \(Hugging Face\); local \(MDS shards\)"),
        ({"files": "a", "streams": {"b": {"files": "c"}}}, "give streams, or files, not both"),
        ({"streams": {}}, "names no source"),
        ({"streams": {"a": {}}}, "no data: give files"),
        ({"streams": {"a": {"hf_name": "x"}}}, "needs a split"),
        ({"hf_name": "a"}, "needs a split"),
        ({"streams": {"a": {"files": "x", "proportion": 1}, "b": {"files": "y"}}}, "these have none: b"),
        ({"streams": {"a": {"files": "x", "proportion": 1, "repeat": 2}}}, "give only one of"),
        ({"packing": False, "packing_ratio": "auto"}, "packing: false contradicts packing_ratio: auto"),
        ({"packing_ratio": 0.5}, "greater than or equal to 1"),
        ({"target_prompts": "length>=0"}, "target_prompts"),
        ({"target_prompts": "some"}, "target_prompts"),
        ({"target_responses": "first"}, "target_responses"),
        ({"decoder_only_format": False}, "Only decoder-only models"),
        ({"streaming": True}, r"Only MDS shards .* can be streamed"),
        ({"epoch_size": 5}, "use choose or repeat"),
        ({"packng": True}, "packng"),
    ],
)
def test_contradictions_are_named(keys, message):
    with pytest.raises(ValidationError, match=message):
        dataset(**keys)


def test_streams_take_from_the_dataset_what_they_leave_out():
    cfg = dataset(split="train", limit=5, streams={"a": {"hf_name": "x"}, "b": {"hf_name": "y", "split": "test"}})
    assert [(name, key, stream.split, stream.limit) for name, key, stream in cfg.sources()] == [
        ("a", "dataset.streams.a.", "train", 5),
        ("b", "dataset.streams.b.", "test", 5),
    ]
