"""Tiny, randomly initialised models of several architectures, saved as their authors would."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROWS = 300
SIZES: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", {**GROUPED, "tie_word_embeddings": True}),
    "gpt_neox": ("GPTNeoXConfig", {**SIZES, "tie_word_embeddings": False}),
    "mpt": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": ROWS}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": ROWS,
                            "bos_token_id": 1, "eos_token_id": 2}),
    "gemma2": ("Gemma2Config", {**GROUPED, "final_logit_softcapping": 1.0, "sliding_window": 32}),
    "granite": ("GraniteConfig", {**GROUPED, "logits_scaling": 3.0, "tie_word_embeddings": False}),
    "cohere": ("CohereConfig", {**GROUPED, "logit_scale": 0.3}),
    "phi": ("PhiConfig", {**SIZES, "tie_word_embeddings": False}),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 2, "tie_word_embeddings": False}),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": ROWS, "bos_token_id": 1,
                              "eos_token_id": 2, "pad_token_id": 0}),
}  # fmt: skip
"""Name -> transformers' config class and its arguments."""


def save_model(folder: Path, architecture: str, **changes: Any) -> Path:
    """Writes a model with visible weights (transformers' own first ones are so small that all logits are alike)."""
    import transformers

    kind, settings = ARCHITECTURES[architecture]
    config = getattr(transformers, kind)(**{**settings, **changes})
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Architecture -> a folder with config.json and model.safetensors, made once."""
    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = save_model(tmp_path_factory.mktemp(architecture) / architecture, architecture)
        return made[architecture]

    return folder
