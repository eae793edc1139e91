"""What a recipe accepts and refuses, through the loader, as a user meets it."""

from typing import Any

import pytest
import yaml

from llmtrain.config.problems import ConfigError
from llmtrain.model.config import MPTConfig
from llmtrain.recipe.load import load_recipe
from llmtrain.recipe.recipe import Recipe


def problems(path: Any, *overrides: str) -> dict[str, str]:
    """Dotted key -> text of every mistake."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return {".".join(problem.path): problem.text for problem in caught.value.problems}


# llm-foundry's train keys that this project has, and those that come with a later feature.
TRAIN_KEYS = [
    "model",
    "tokenizer",
    "optimizer",
    "scheduler",
    "train_loader",
    "global_train_batch_size",
    "device_eval_batch_size",
    "device_train_microbatch_size",
    "max_duration",
    "max_seq_len",
    "seed",
    "precision",
    "code_paths",
    "max_split_size_mb",
    "expandable_segments",
    "cuda_load_lazy",
    "dist_timeout",
    "fsdp_config",
    "accumulate_train_batch_on_tokens",
    "eval_interval",
    "eval_loader",
    "eval_subset_num_batches",
    "eval_first",
    "loggers",
    "callbacks",
    "algorithms",
    "progress_bar",
    "log_to_console",
    "python_log_level",
    "console_log_interval",
    "log_config",
    "save_folder",
    "save_filename",
    "save_latest_filename",
    "save_interval",
    "save_num_checkpoints_to_keep",
    "save_overwrite",
    "save_weights_only",
    "save_ignore_keys",
    "load_ignore_keys",
    "load_path",
    "load_weights_only",
    "load_strict_model_weights",
    "autoresume",
    "train_subset_num_batches",
    "spin_dataloaders",
    "sequence_parallel_degree",  # llmtrain's own
    "compile_config",
    "metadata",
    "flatten_metadata",
    "run_name",
    "profiler",
    "variables",
    "icl_tasks",
    "eval_gauntlet",
    "icl_subset_num_batches",
    "icl_seq_len",
    "best_checkpoint",  # llmtrain's own, as those below
    "bad_steps",
    "watchdog",
    "deterministic",
    "save_async",
    "save_keep_every",
]
LATER_KEYS = [
    "tp_config",
    "only_hf_checkpoint",
    "only_composer_checkpoint",
    "device_train_batch_size",
    "n_gpus",
    "device_train_grad_accum",
]


def test_every_train_key_of_llm_foundry_is_known_or_explained() -> None:
    assert set(TRAIN_KEYS) == set(Recipe.model_fields)
    assert set(LATER_KEYS) <= set(Recipe.ADVICE)


def test_defaults(write) -> None:
    recipe = load_recipe(write())
    assert recipe.seed == 17
    assert recipe.precision == "amp_bf16"
    assert recipe.dist_timeout == 600.0
    assert recipe.accumulate_train_batch_on_tokens
    assert recipe.eval_interval == "1ep"
    assert recipe.save_interval == "1000ba"
    assert recipe.fsdp_config is None
    assert recipe.evaluators() == {}


def test_every_field_has_documentation() -> None:
    from llmtrain.config.schema_keys import fields_of, models_in

    seen, todo = set(), [Recipe]
    while todo:
        model = todo.pop()
        if model in seen:
            continue
        seen.add(model)
        for name, info in fields_of(model).items():
            assert info.description, f"{model.__name__}.{name}"
            todo += models_in(info.annotation)
    assert MPTConfig in seen


ALIBI = "the run would train without ALiBi"


ICL_TASK = {"label": "t", "dataset_uri": "x.jsonl", "num_fewshot": [0], "icl_task_type": "language_modeling"}
CATEGORY = {"name": "a", "benchmarks": [{"name": "t", "num_fewshot": 0, "random_baseline": 0.5}]}
SHAPE = {"d_model": 32, "n_heads": 2, "n_layers": 1}


@pytest.mark.parametrize(
    ("changes", "key", "text"),
    [
        ({"alibi": True}, "alibi", ALIBI),
        ({"algorithms": {"alibi": {"max_sequence_length": 2048}}}, "algorithms.alibi", ALIBI),
        ({"algorithms": {"gated_linear_units": {}}}, "algorithms.gated_linear_units", "model.ffn_config.ffn_type"),
        ({"algorithms": {"low_precision_layernorm": {}}}, "algorithms.low_precision_layernorm", "model.norm_type"),
        ({"device_train_microbatch_size": "auto"}, "device_train_microbatch_size", "Write a number: start with 1"),
        ({"precision": "amp_fp8"}, "precision", "Use `amp_bf16`"),
        ({"precision": "bf16"}, "precision", "Did you mean `amp_bf16`?"),
        ({"max_duration": "100x"}, "max_duration", "Units: `ep` (epochs)"),
        ({"max_duration": "0.5dur"}, "max_duration", "cannot stand here"),
        ({"max_duration": "1000tok"}, "scheduler.t_warmup", "must be in `tok` or `dur`"),
        ({"global_train_batch_size": 0}, "global_train_batch_size", "greater than 0"),
        ({"global_train_batch_size": None}, "global_train_batch_size", "This key is required."),
        ({"optimizer": {"name": "adam", "lr": 1}}, "optimizer.name", "Did you mean `adamw`?"),
        ({"optimizer": {"name": "lion"}}, "optimizer.name", "Did you mean `decoupled_lionw`?"),
        ({"optimizer": {"nme": "adamw"}}, "optimizer.name", "`nme` is not a key here"),
        ({"optimizer": {"name": "adamw", "learning_rate": 1}}, "optimizer.learning_rate", "called `lr`"),
        ({"scheduler": {"name": "cosine", "t_warmup": 1}}, "scheduler.name", "`cosine_with_warmup`"),
        ({"scheduler": {"name": "cosine_with_warmup"}}, "scheduler.t_warmup", "This key is required."),
        (
            {"optimizer": {"name": "adamw", "param_groups": [{"param_str_match": "(", "lr": 1}]}},
            "optimizer.param_groups.0.param_str_match",
            "Not a regular expression",
        ),
        (
            {"optimizer": {"name": "decoupled_lionw", "param_groups": [{"param_str_match": "a", "eps": 1}]}},
            "optimizer.param_groups.0.eps",
            "Lion has no eps",
        ),
        ({"callbacks": {"speed_monitr": {}}}, "callbacks.speed_monitr", "Did you mean `speed_monitor`?"),
        ({"callbacks": {"speed_monitor": {"window": 3}}}, "callbacks.speed_monitor.window", "`window_size`"),
        (
            {
                "callbacks": {
                    "hf_checkpointer": {"save_folder": "x", "save_interval": "1ba", "mlflow_logging_config": {}}
                }
            },
            "callbacks.hf_checkpointer.mlflow_logging_config",
            "MLflow's registry is not used",
        ),
        (
            {"callbacks": {"early_stopper": {"monitor": "x", "dataloader_label": "eval"}}},
            "callbacks.early_stopper.dataloader_label",
            "none: there is no eval_loader",
        ),
        ({"loggers": {"wanbd": {}}}, "loggers.wanbd", "Did you mean `wandb`?"),
        ({"loggers": {"mosaicml": {}}}, "loggers.mosaicml", "Remove it."),
        ({"fsdp_config": {"sharding_strategy": "ZERO"}}, "fsdp_config.sharding_strategy", "`FULL_SHARD`"),
        ({"fsdp_config": {"cpu_offload": True}}, "fsdp_config.cpu_offload", "Remove the key"),
        ({"autoresume": True}, "autoresume", "without `save_folder`"),
        ({"autoresume": True, "save_folder": "x", "save_overwrite": True}, "autoresume", "keep one of the two"),
        ({"run_name": "../up"}, "run_name", "names a folder"),
        ({"python_log_level": "verbose"}, "python_log_level", "`debug`"),
        ({"global_seed": 17}, "global_seed", "called `seed`"),
        ({"icl_max_seq_len": 17}, "icl_max_seq_len", "icl_seq_len"),
        ({"data_local": "x"}, "data_local", "${variables.data_local}"),
        ({"tokenizer_name": "x"}, "tokenizer_name", "tokenizer.name"),
        ({"dataset": {}}, "dataset", "train_loader.dataset"),
        ({"n_gpus": 8}, "n_gpus", "Remove it"),
        ({"eval_gauntlet": {"categories": [CATEGORY]}}, "eval_gauntlet", "Add `icl_tasks`"),
        ({"icl_tasks": [{**ICL_TASK, "num_fewshots": 1}]}, "icl_tasks.0.num_fewshots", "Did you mean `num_fewshot`?"),
        ({"icl_tasks": [ICL_TASK, ICL_TASK]}, "icl_tasks.1.label", "stands there twice"),
        ({"best_checkpoint": {}}, "best_checkpoint", "Give one, or remove this"),
        (
            {"best_checkpoint": {"dataloader_label": "t/1-shot"}, "save_folder": "x", "icl_tasks": [ICL_TASK]},
            "best_checkpoint.dataloader_label",
            "Known: `t/0-shot`",
        ),
        (
            {"best_checkpoint": {"dataloader_label": "t/0-shot"}, "save_folder": "x", "icl_tasks": [ICL_TASK]},
            "best_checkpoint.monitor",
            "t/0-shot has InContextLearningLMAccuracy",
        ),
        ({"callbacks": {"eval_gauntlet": {}}}, "callbacks.eval_gauntlet", "top level"),
        (
            {"train_loader": {"name": "finetuning", "dataset": {"hf_name": "x"}}},
            "train_loader.dataset.hf_name",
            "needs a split",
        ),
        ({"train_loader": {"name": "finetunng", "dataset": {}}}, "train_loader.name", "Did you mean `finetuning`?"),
        ({"load_path": "x", "model": {**SHAPE, "pretrained": "y"}}, "load_path", "Keep one of the two"),
        ({"model": {**SHAPE, "pretrained": "y", "init_device": "meta"}}, "model.init_device", "write `mixed`"),
        (
            {"model": {**SHAPE, "attn_config": {"attn_uses_sequence_id": True}}},
            "train_loader.dataset.eos_token_id",
            "where a document ends",
        ),
        ({"model": {"name": "hf_t5"}}, "model.name", "`hf_causal_lm`"),
        ({"model": {"name": "mpt"}}, "model.name", "`mpt_causal_lm`, `hf_causal_lm`. Did you mean `mpt_causal_lm`?"),
        ({"batch_size": 8}, "batch_size", "`variables`"),
        (
            {"algorithms": {"seq_length_warmup": {"max_seq_length": 16}}},
            "algorithms.seq_length_warmup.max_seq_length",
            "the rest would never be read",
        ),
        (
            {"algorithms": {"seq_length_warmup": {"truncate": False, "preserve_end_of_sequence": True}}},
            "algorithms.seq_length_warmup.preserve_end_of_sequence",
            "Nothing is cut off",
        ),
        (
            {"algorithms": {"seq_length_warmup": {"min_seq_length": 1}}},
            "algorithms.seq_length_warmup.min_seq_length",
            "at least 2",
        ),
        (
            {
                "algorithms": {"seq_length_warmup": {}},
                "train_loader": {"name": "finetuning", "dataset": {"hf_name": "json", "split": "train"}},
            },
            "algorithms.seq_length_warmup.truncate",
            "Answers stand at the end",
        ),
        ({"model": SHAPE, "sequence_parallel_degree": 3}, "sequence_parallel_degree", "Choose a divisor"),
        (
            {"model": {"name": "hf_causal_lm", "pretrained_model_name_or_path": "x"}, "sequence_parallel_degree": 2},
            "sequence_parallel_degree",
            "Only MPT models",
        ),
    ],
)
def test_each_mistake_is_named(write, changes: dict[str, Any], key: str, text: str) -> None:
    found = problems(write(**changes))
    assert list(found) == [key]
    assert text in found[key]


@pytest.mark.parametrize("block", ["model", "train_loader", "train_loader.dataset", "optimizer", "fsdp_config"])
def test_a_misplaced_alibi_is_named_wherever_it_is(write, block: str) -> None:
    found = problems(write(fsdp_config={}), f"{block}.alibi=true")
    assert list(found) == [f"{block}.alibi"]
    assert "`model.attn_config.alibi`" in found[f"{block}.alibi"]
    assert ALIBI in found[f"{block}.alibi"]


def test_unknown_keys_at_any_depth(write) -> None:
    path = write(fsdp_config={}, eval_loader={"name": "text", "label": "x", "dataset": {"local": "data"}})
    blocks = [
        "model",
        "model.attn_config",
        "model.ffn_config.ffn_act_fn",
        "model.init_config",
        "tokenizer",
        "optimizer",
        "scheduler",
    ]
    blocks += ["train_loader", "train_loader.dataset", "eval_loader", "eval_loader.dataset", "fsdp_config"]
    overrides = [f"{block}.zzz=1" for block in blocks] + ["train_loader.dataset.streams.a.zzz=1", "zzz=1"]
    found = problems(path, *overrides)
    assert set(found) >= {override.removesuffix("=1") for override in overrides}


def test_lists_of_evaluators(write) -> None:
    loaders = [{"name": "text", "label": label, "dataset": {"local": "data"}} for label in ("c4", "code")]
    assert list(load_recipe(write(eval_loader=loaders)).evaluators()) == ["eval/c4", "eval/code"]
    single = {"name": "text", "dataset": {"local": "data"}}
    assert list(load_recipe(write(eval_loader=single)).evaluators()) == ["eval"]
    assert load_recipe(write(eval_loader=[])).evaluators() == {}

    assert "have this label" in problems(write(eval_loader=loaders), "eval_loader[1].label=c4")["eval_loader.1.label"]
    assert "needs a `label`" in problems(write(eval_loader=[*loaders, single]))["eval_loader.2.label"]


def test_adaptive_clipping_only_without_sharding(write) -> None:
    clipping = {"gradient_clipping": {"clipping_type": "adaptive", "clipping_threshold": 0.1}}
    load_recipe(write(algorithms=clipping))
    load_recipe(write(algorithms=clipping, fsdp_config={"sharding_strategy": "NO_SHARD"}))
    found = problems(write(algorithms=clipping, fsdp_config={}))
    assert "Use `norm`" in found["algorithms.gradient_clipping.clipping_type"]


def test_the_dtype_of_mixed_precision_is_the_precision(write) -> None:
    fsdp = {"mixed_precision": {"param_dtype": "fp16", "reduce_dtype": "fp32"}}
    load_recipe(write(fsdp_config=fsdp, precision="amp_fp16"))
    assert "write `amp_fp16`" in problems(write(fsdp_config=fsdp))["fsdp_config.mixed_precision.param_dtype"]


@pytest.mark.parametrize(
    ("changes", "resumes"),
    [
        ({}, False),
        ({"save_folder": "x"}, True),
        ({"save_folder": "x", "save_overwrite": True}, False),
        ({"save_folder": "x", "save_weights_only": True}, False),
        ({"save_folder": "x", "autoresume": False}, False),
        ({"save_folder": "x", "autoresume": True}, True),
    ],
)
def test_when_a_run_resumes(write, changes: dict[str, Any], resumes: bool) -> None:
    assert load_recipe(write(**changes)).resumes is resumes


def test_a_dumped_recipe_is_the_same_recipe(write) -> None:
    path = write(
        eval_loader={"name": "text", "dataset": {"local": "data"}},
        callbacks={"lr_monitor": None, "speed_monitor": {"window_size": 3}, "nan_monitor": False},
        loggers={"in_memory_logger": {}},
        algorithms={"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1}},
        fsdp_config={"mixed_precision": {"param_dtype": "bf16"}},
        optimizer={
            "name": "adamw",
            "param_groups": [{"param_str_match": "norm", "weight_decay": 0}],
            "disable_grad": "wte",
        },
    )
    recipe = load_recipe(path)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(path) == recipe
