"""A byte-level BPE tokenizer (GPT-2's kind: Radford et al. 2019), trained with `tokenizers`."""

import json
from collections.abc import Iterable
from pathlib import Path

from llmtrain.errors import UserError
from llmtrain.prep.config import TokenizerTraining


def train_tokenizer(texts: Iterable[str], cfg: TokenizerTraining, folder: Path) -> None:
    """Train on texts and write a folder that `AutoTokenizer.from_pretrained` opens (transformers 4.51 to 5.x).

    Every string can be encoded (all 256 bytes are in the vocabulary) and decodes to itself. The same texts give the
    same tokenizer.

    Raises:
        UserError: the texts do not hold enough different pairs for `vocab_size`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [cfg.eos_token, *(token for token in cfg.special_tokens if token != cfg.eos_token)]
    trainer = trainers.BpeTrainer(
        vocab_size=cfg.vocab_size,
        min_frequency=cfg.min_frequency,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < cfg.vocab_size:
        raise UserError(
            f"tokenizer.train.vocab_size: the sample gave {tokenizer.get_vocab_size()} of {cfg.vocab_size} tokens. "
            "Raise tokenizer.train.max_bytes, or lower vocab_size or min_frequency"
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{role}_token": cfg.eos_token for role in ("bos", "eos", "pad", "unk")}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # transformers' own way to say: no limit
        **names,
    }
    if cfg.special_tokens:
        names["additional_special_tokens"] = special[1:]  # type: ignore[assignment]
        config["additional_special_tokens"] = special[1:]
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", names)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
