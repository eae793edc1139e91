import pytest

from llmtrain.config.secrets import MASK, redact


@pytest.mark.parametrize(
    "key", ["api_key", "WANDB_API_KEY", "token", "hf_token", "aws_secret_access_key", "password", "secret"]
)
def test_values_under_secret_names_are_masked(key: str) -> None:
    assert redact({"a": [{key: "planted"}]}) == {"a": [{key: MASK}]}


def test_passwords_in_urls_are_masked() -> None:
    assert redact(["sftp://me:planted@host:22/x"]) == [f"sftp://{MASK}@host:22/x"]


def test_ordinary_recipe_keys_stay() -> None:
    ordinary = {
        "tokenizer": {"name": "gpt2"}, "eos_token_id": 0, "token_encoding_type": "uint16", "url": "s3://bucket/x@2",
        "accumulate_train_batch_on_tokens": True, "param_str_match": "key", "api_key": None, "password": "",
    }  # fmt: skip
    assert redact(ordinary) == ordinary
