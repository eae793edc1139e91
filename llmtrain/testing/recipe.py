"""A training recipe that takes seconds, for tests of training."""

from pathlib import Path
from typing import Any

import yaml

from llmtrain.testing.corpus import TinyCorpus


def tiny_recipe(path: Path, corpus: TinyCorpus, **changes: Any) -> Path:
    """Writes a recipe of a two-layer MPT on `corpus` with dropout, so that the random state matters.

    Args:
        path: where the YAML goes; its stem is the run's name.
        corpus: of `llmtrain.testing.corpus.tiny_corpus`.
        changes: top-level keys to replace; None removes a key.

    Returns:
        `path`.
    """
    recipe: dict[str, Any] = {
        "run_name": path.stem,
        "max_seq_len": 64,
        "model": {
            "name": "mpt_causal_lm",
            "init_device": "mixed",
            "d_model": 48,
            "n_heads": 3,
            "n_layers": 2,
            "vocab_size": corpus.vocab_size,
            "no_bias": True,
            "resid_pdrop": 0.1,
            "attn_config": {"alibi": True},
        },
        "tokenizer": {"name": str(corpus.tokenizer)},
        "train_loader": {
            "name": "text",
            "dataset": {"local": str(corpus.train), "shuffle": True, "num_canonical_nodes": 4},
            "num_workers": 0,
        },
        "eval_loader": {
            "name": "text",
            "dataset": {"local": str(corpus.val), "num_canonical_nodes": 2},
            "drop_last": False,
            "num_workers": 0,
        },
        "optimizer": {"name": "decoupled_adamw", "lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 1e-5},
        "scheduler": {"name": "cosine_with_warmup", "t_warmup": "2ba", "alpha_f": 0.1},
        "algorithms": {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0}},
        "max_duration": "12ba",
        "global_train_batch_size": 8,
        "device_train_microbatch_size": 2,
        "device_eval_batch_size": 4,
        "precision": "fp32",
        "eval_interval": "5ba",
        "eval_subset_num_batches": 2,
        "fsdp_config": {"sharding_strategy": "FULL_SHARD"},
        "console_log_interval": "1ba",
        "save_folder": "runs/{run_name}/checkpoints",
        "save_interval": "4ba",
    }
    recipe.update(changes)
    path.write_text(yaml.safe_dump({k: v for k, v in recipe.items() if v is not None}, sort_keys=False))
    return path
