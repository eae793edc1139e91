"""Tokenizers: found by name or folder, opened light (`tokenizers`) or full (`transformers`), and told apart by hash."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llmtrain.config.base import Config
from llmtrain.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


class TokenizerConfig(Config):
    """Which tokenizer a recipe uses."""

    name: str = Field(min_length=1)
    """A name on the Hugging Face hub (`EleutherAI/gpt-neox-20b`), or a local folder with a `tokenizer.json`."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to `AutoTokenizer.from_pretrained`; `model_max_length` is set exactly as given here."""
