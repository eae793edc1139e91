import json
import shutil
from pathlib import Path

import pytest

from llmtrain.errors import UserError
from llmtrain.testing.corpus import TinyCorpus, tiny_corpus
from llmtrain.tokenizer import (
    TokenizerConfig,
    fingerprint,
    fingerprint_of,
    load_raw,
    load_tokenizer,
    save_tokenizer,
    special_token,
    tokenizer_json_path,
    tokenizer_size,
    with_chat_template,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    return tiny_corpus(tmp_path_factory.mktemp("corpus") / "tiny", max_bytes=60_000, vocab_size=320)


def edited(folder: Path, target: Path, change) -> str:
    shutil.copytree(folder, target)
    content = json.loads((target / "tokenizer.json").read_text())
    change(content)
    (target / "tokenizer.json").write_text(json.dumps(content))
    return str(target)


def test_full_and_light_tokenizer_agree_and_round_trip(corpus):
    full = load_tokenizer(TokenizerConfig(name=str(corpus.tokenizer), kwargs={"model_max_length": 77}))
    raw = load_raw(str(corpus.tokenizer))
    text = 'def f(x):\n\treturn "ünïcödé 漢字 🙂"  # \x00\r\n'
    assert full.encode(text) == raw.encode(text).ids
    assert full.decode(full.encode(text)) == text
    assert full.model_max_length == 77
    assert len(full) == corpus.vocab_size
    assert full.eos_token_id == full.bos_token_id == full.pad_token_id == corpus.eos_token_id


def test_fingerprint_survives_save_pretrained_and_padding(corpus, tmp_path):
    full = load_tokenizer(TokenizerConfig(name=str(corpus.tokenizer)))
    full(["a", "b b b"], padding=True, truncation=True, max_length=2)  # leaves both switched on in the backend
    full.save_pretrained(tmp_path / "saved")
    assert fingerprint(str(tmp_path / "saved")) == fingerprint(str(corpus.tokenizer)) == corpus.tokenizer_fingerprint


def test_fingerprint_ignores_the_spelling_of_merges(corpus, tmp_path):
    def respell(content):
        merges = content["model"]["merges"]
        content["model"]["merges"] = [m.split(" ") if isinstance(m, str) else " ".join(m) for m in merges]

    assert fingerprint(edited(corpus.tokenizer, tmp_path / "t", respell)) == corpus.tokenizer_fingerprint


def swap_two_ids(content):
    vocab = content["model"]["vocab"]
    a, b = list(vocab)[100:102]
    vocab[a], vocab[b] = vocab[b], vocab[a]


def swap_two_merges(content):
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def add_a_token(content):
    content["added_tokens"].append({**content["added_tokens"][0], "id": 9999, "content": "<|extra|>"})


@pytest.mark.parametrize("change", [swap_two_ids, swap_two_merges, add_a_token])
def test_fingerprint_sees_what_changes_the_meaning_of_ids(corpus, tmp_path, change):
    assert fingerprint(edited(corpus.tokenizer, tmp_path / "t", change)) != corpus.tokenizer_fingerprint


def test_special_tokens_are_read_from_the_files(corpus):
    assert special_token(str(corpus.tokenizer), "eos") == "<|endoftext|>"


def test_missing_folder_is_not_taken_for_a_hub_name(tmp_path):
    name = str(tmp_path / "nowhere")
    for call in (tokenizer_json_path, fingerprint, load_raw, lambda n: load_tokenizer(TokenizerConfig(name=n))):
        with pytest.raises(UserError, match="no folder"):
            call(name)


def test_folder_without_tokenizer_json(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        fingerprint(str(tmp_path))


def test_no_end_of_text_token(corpus, tmp_path):
    shutil.copytree(corpus.tokenizer, tmp_path / "t")
    (tmp_path / "t" / "special_tokens_map.json").unlink()
    (tmp_path / "t" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(TokenizerConfig(name=str(tmp_path / "t")))


def test_damaged_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        fingerprint(str(tmp_path))
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_raw(str(tmp_path))


def test_code_of_a_folder_is_not_run(corpus, tmp_path):
    """A tokenizer that brings its own class must be refused or opened without it, never imported."""
    shutil.copytree(corpus.tokenizer, tmp_path / "t")
    config = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config["tokenizer_class"] = "Evil"
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "t" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    refusal = ""
    try:
        load_tokenizer(TokenizerConfig(name=str(tmp_path / "t")))
    except UserError as error:
        refusal = str(error)
    assert not refusal or "tokenizer.kwargs.trust_remote_code" in refusal
    assert not (tmp_path / "ran").exists()


def config(corpus, **keys):
    return TokenizerConfig(name=str(corpus.tokenizer), **keys)


def test_without_new_keys_a_tokenizer_is_what_it_was(corpus):
    full = load_tokenizer(config(corpus))
    assert fingerprint_of(full) == fingerprint(str(corpus.tokenizer))
    assert not full.chat_template
    assert len(full) == tokenizer_size(config(corpus)) == corpus.vocab_size


@pytest.mark.parametrize(
    ("keys", "added"),
    [
        ({"chat_template": "chatml"}, ["<|im_start|>", "<|im_end|>"]),
        ({"chat_template": "dolly"}, []),
        (
            {"chat_template": "chatml", "special_tokens": ["<|a|>", "<|im_end|>"]},
            ["<|im_start|>", "<|im_end|>", "<|a|>"],
        ),
        ({"special_tokens": ["<|endoftext|>"]}, []),
        ({"kwargs": {"pad_token": "<|pad|>"}}, ["<|pad|>"]),
    ],
)
def test_template_and_tokens_travel_with_save_pretrained(corpus, tmp_path, keys, added):
    cfg = config(corpus, **keys)
    full = load_tokenizer(cfg)
    assert [full.convert_ids_to_tokens(n) for n in range(corpus.vocab_size, len(full))] == added
    assert tokenizer_size(cfg) == len(full)
    full.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == full.chat_template
    assert fingerprint_of(again) == fingerprint_of(full) == fingerprint(str(tmp_path))
    text = "<|im_start|>user\na <|im_end|>"
    assert again.encode(text) == full.encode(text)
    for token in added:
        assert again.encode(f"x{token}y").count(again.convert_tokens_to_ids(token)) == 1
        assert again.decode(again.encode(f"x{token}y"), skip_special_tokens=True) == "xy"
    # A tokenizer that has the tokens and the template already gets nothing twice.
    reopened = TokenizerConfig(name=str(tmp_path), **{**keys, "kwargs": {}})
    assert len(load_tokenizer(reopened)) == tokenizer_size(reopened) == len(full)


def test_what_is_saved_opens_in_every_version_of_transformers(corpus, tmp_path):
    """Version 4 does not know the class that version 5 writes; both know the older name."""
    tokenizer = load_tokenizer(TokenizerConfig(name=str(corpus.tokenizer), chat_template="chatml"))
    save_tokenizer(tokenizer, tmp_path / "saved")
    written = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = load_tokenizer(TokenizerConfig(name=str(tmp_path / "saved")))
    assert again.chat_template == tokenizer.chat_template
    assert fingerprint_of(again) == fingerprint_of(tokenizer)
    assert {path.name for path in (tmp_path / "saved").iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}


def test_chatml_where_there_is_no_template(corpus, tmp_path):
    full = with_chat_template(load_tokenizer(config(corpus)))
    assert full.chat_template == load_tokenizer(config(corpus, chat_template="chatml")).chat_template
    assert len(full) == tokenizer_size(config(corpus), chat=True) == corpus.vocab_size + 2
    full.save_pretrained(tmp_path)
    assert tokenizer_size(TokenizerConfig(name=str(tmp_path)), chat=True) == len(full)
    dolly = load_tokenizer(config(corpus, chat_template="dolly"))
    assert with_chat_template(dolly).chat_template.count("### Response") == 1
    assert len(dolly) == tokenizer_size(config(corpus, chat_template="dolly"), chat=True) == corpus.vocab_size
