import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.redaction import (
    MASK,
    RedactedStream,
    redact,
    redact_arguments,
    redact_text,
    redact_variables,
    without_masked,
    without_password,
)


@pytest.mark.parametrize(
    "key",
    [
        *("api_key", "WANDB_API_KEY", "token", "hf_token", "aws_secret_access_key", "password", "secret"),
        *("X-Api-Key", "accessToken", "wandbApiKey", "secret-key", "connection-string", "clientSecret"),
    ],
)
def test_values_under_secret_names_are_masked(key: str) -> None:
    assert redact({"a": [{key: "planted"}]}) == {"a": [{key: MASK}]}


def test_passwords_in_urls_are_masked() -> None:
    assert redact(["sftp://me:planted@host:22/x"]) == [f"sftp://{MASK}@host:22/x"]


@pytest.mark.parametrize("password", ["plan@ted", "plan/ted", "p:lan/ted", "plan@te@d", "plan?ted#"])
def test_passwords_that_nobody_escaped_are_masked(password: str) -> None:
    assert redact_text(f"see sftp://me:{password}@host:22/x.") == f"see sftp://{MASK}@host:22/x."
    assert without_password(f"see sftp://me:{password}@host:22/x.") == f"see sftp://me:{MASK}@host:22/x."


@pytest.mark.parametrize(
    "url", ["https://host:9000/data@v1", "s3://bucket/a@b", "https://host:80", "http://[::1]:80/a@b", "hf://a/b@main"]
)
def test_what_only_looks_like_a_password_stays(url: str) -> None:
    assert redact_text(url) == without_password(url) == url


def test_keys_that_look_like_paths_are_masked_and_paths_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One AWS key of 64 begins with a slash."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "/planted+aws/key")
    (tmp_path / "token").touch()
    monkeypatch.setenv("MY_TOKEN", str(tmp_path / "token"))
    assert redact_text(f"a /planted+aws/key b {tmp_path}/token") == f"a {MASK} b {tmp_path}/token"


def test_a_key_of_several_lines_is_known_by_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPLOY_PRIVATE_KEY", "-----BEGIN KEY-----\nplanted0planted0planted\nend\n-----END KEY-----\n")
    assert redact_text("a planted0planted0planted b -----BEGIN KEY----- end") == f"a {MASK} b -----BEGIN KEY----- end"


def test_blocks_among_arguments_are_looked_into() -> None:
    given = [
        "loggers={wandb: {init_kwargs: {api_key: planted, notes: a}}}",
        "a=[{token: planted}]",
        "b={c: d}",
        "e={{:",
    ]
    masked = ['loggers={"wandb": {"init_kwargs": {"api_key": "***", "notes": "a"}}}', 'a=[{"token": "***"}]']
    assert redact_arguments(given) == [*masked, "b={c: d}", "e={{:"]


def test_variables_to_be_shown_are_judged_by_their_names() -> None:
    given = {"MY_PASS": "planted!", "AWS_ACCESS_KEY_ID": "planted0", "A": "https://me:planted@h", "EMPTY_TOKEN": ""}
    assert redact_variables(given) == {
        **{"MY_PASS": MASK, "AWS_ACCESS_KEY_ID": MASK, "A": f"https://{MASK}@h", "EMPTY_TOKEN": ""}
    }


def test_ordinary_recipe_keys_stay() -> None:
    ordinary = {
        "tokenizer": {"name": "gpt2"}, "eos_token_id": 0, "token_encoding_type": "uint16", "url": "s3://bucket/x@2",
        "accumulate_train_batch_on_tokens": True, "param_str_match": "key", "api_key": None, "password": "",
    }  # fmt: skip
    assert redact(ordinary) == ordinary


@pytest.mark.parametrize(
    "key", ["eosToken", "maxTokens", "eos_token", "pad_token", "additional_special_tokens", "tokens", "n_token_ids"]
)
def test_the_tokens_of_a_tokenizer_are_no_secrets(key: str) -> None:
    assert redact({key: "<|endoftext|>"}) == {key: "<|endoftext|>"}


def test_secrets_of_the_environment_are_found_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_API_KEY", 'pla"nted/1234')
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted+5678")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json")  # a path
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    text = redact_text(
        'a pla"nted/1234 b planted+5678 c planted%2B5678 d {"k": "pla\\"nted/1234"} /home/me/key.json abc'
    )
    assert text == f'a {MASK} b {MASK} c {MASK} d {{"k": "{MASK}"}} /home/me/key.json abc'
    assert redact({"note": ["x planted+5678"]}) == {"note": [f"x {MASK}"]}


@pytest.mark.parametrize("name", ["sig", "X-Amz-Signature", "token", "access_token", "X-Goog-Signature"])
def test_signatures_in_urls_are_masked(name: str) -> None:
    assert redact_text(f"https://h/x?a=1&{name}=pla%2Fnted&b=2") == f"https://h/x?a=1&{name}={MASK}&b=2"
    assert without_password(f"https://h/x?{name}=planted: failed") == f"https://h/x?{name}={MASK} failed"


def test_arguments_are_judged_by_their_keys() -> None:
    given = [
        "run.yaml",
        "metadata.api_key=planted",
        "max_duration=2ba",
        "train_loader.dataset.remote=sftp://u:planted@h",
    ]
    assert redact_arguments(given) == [
        "run.yaml", f"metadata.api_key={MASK}", "max_duration=2ba", f"train_loader.dataset.remote=sftp://{MASK}@h",
    ]  # fmt: skip


def test_who_listens_to_what_is_printed_hears_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Composer's file logger and W&B do it."""
    monkeypatch.setenv("X_TOKEN", "planted-value")
    below, heard = io.StringIO(), []
    stream = RedactedStream(below)
    before = stream.write

    def write(text: str) -> int:
        heard.append(text)
        return before(text)

    stream.write = write
    print("a planted-value b", file=stream)
    stream.write = before
    print("c planted-value", file=stream)
    assert "".join(heard) == "a *** b\n"
    assert below.getvalue() == "a *** b\nc ***\n"


def test_numbers_under_secret_names_are_masked() -> None:
    assert redact({"password": 12345678, "token": True}) == {"password": MASK, "token": True}


def test_what_was_masked_is_as_if_it_had_not_been_given() -> None:
    assert without_masked({"a": {"token": MASK, "b": [1, {"c": MASK}]}}) == {"a": {"b": [1, {}]}}


def test_what_a_process_prints_holds_no_secret(tmp_path: Path) -> None:
    code = (
        "import os, sys, logging; from llmtrain.redaction import RedactedFormatter, redact_output; redact_output();"
        "redact_output(); print('out', os.environ['X_TOKEN']); print('err', os.environ['X_TOKEN'], file=sys.stderr);"
        "raise RuntimeError('https://me:planted-pass@h/' + os.environ['X_TOKEN'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "X_TOKEN": "planted-value"}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "out ***" in done.stdout
    assert "err ***" in done.stderr
    assert "RuntimeError: https://***@h/***" in done.stderr
    assert "planted" not in (done.stdout + done.stderr).replace("'https://me:planted-pass", "")
