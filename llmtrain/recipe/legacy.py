"""What to say about keys of old llm-foundry recipes that are no longer keys."""

from collections.abc import Mapping

ALIBI = "It belongs in `model.attn_config.alibi`. Here it would have no effect, and the run would train without ALiBi."

MICROBATCH_AUTO = (
    "`auto` tries sizes until one fits, which Composer cannot do with FSDP2 (one rank would run out of memory while "
    "the others wait). Write a number: start with 1 and double it while it fits. It does not change the result."
)

_COMPUTED = "It follows from `global_train_batch_size` and the number of ranks. Remove it."

ADVICE: Mapping[str, str] = {
    "alibi": ALIBI,
    "*.alibi": ALIBI,
    "alibi_bias_max": "It belongs in `model.attn_config.alibi_bias_max`.",
    "*.alibi_bias_max": "It belongs in `model.attn_config.alibi_bias_max`.",
    "global_seed": "It is called `seed` now; for interpolation put it under `variables`.",
    "data_local": "Put it under `variables`, as `${variables.data_local}`, or set `train_loader.dataset.local`.",
    "data_remote": "Put it under `variables`, as `${variables.data_remote}`, or set `train_loader.dataset.remote`.",
    "tokenizer_name": "Put it under `variables`, as `${variables.tokenizer_name}`, or set `tokenizer.name`.",
    "dataset": "A dataset stands inside its loader: `train_loader.dataset`.",
    "icl_max_seq_len": "The key is `icl_seq_len`.",
    "icl_tasks_str": "Write the path under `icl_tasks`.",
    "eval_gauntlet_str": "Write the path under `eval_gauntlet`.",
    "eval_loaders": "The key is `eval_loader`; it takes one loader or a list.",
    "tp_config": "Tensor parallelism is not built. Shard with `fsdp_config`.",
    "parallelism_config": "Write `fsdp_config`.",
    "deepspeed_config": "DeepSpeed is not used. Write `fsdp_config`.",
    "batch_size": "The batch is `global_train_batch_size`; a value for interpolation goes under `variables`.",
    "n_gpus": _COMPUTED,
    "device_train_batch_size": _COMPUTED,
    "device_train_grad_accum": _COMPUTED,
    "grad_accum": "Write `device_train_microbatch_size`: samples that fit into one pass.",
    "device_train_microbatch": "The key is `device_train_microbatch_size`.",
    "only_hf_checkpoint": "Use `llmtrain export CHECKPOINT OUT`.",
    "only_composer_checkpoint": "Use `llmtrain export CHECKPOINT OUT` for the other direction; remove this key.",
    "name": "The run's name is `run_name`.",
    "model.attn_impl": "It belongs in `model.attn_config.attn_impl`.",
    "model.attn_config.triton": "Triton attention is gone. Use `attn_impl: auto`.",
    "model.master_weights_dtype": "Master weights are always fp32. Use `precision` and `fsdp_config.mixed_precision`.",
    "model.ffn_config_defaults": "Write `ffn_config`.",
    "train_loader.dataset.tokenizer_name": "The tokenizer is named once, in `tokenizer.name`.",
    "train_loader.dataset.group_method": "Shards are cut to length by `llmtrain prep` already. Remove it.",
    "model.name=hf_*": "Of Hugging Face's models only causal language models are trained: `hf_causal_lm`.",
    "*.hf_name": "It belongs to `name: finetuning`. For `text` run `llmtrain prep` and name its output in `local`.",
    "*.decoder_only_format": "It belongs to `name: finetuning`; `text` does not need it.",
    "*.packing_ratio": "It belongs to `name: finetuning`; rows of `text` are always full.",
}
