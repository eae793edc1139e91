"""What users do with a plain export: transformers' other heads, its pipeline, its server."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch

from llmtrain.checkpoint.hugging_face import write_hf_folder
from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT
from llmtrain.tokenizer import TokenizerConfig, load_tokenizer, save_tokenizer


@pytest.fixture(scope="module")
def exported(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MPT with a tokenizer that has a chat template."""
    place = tmp_path_factory.mktemp("opens")
    save_tokenizer(load_tokenizer(TokenizerConfig(name=str(tokenizer), chat_template="chatml")), place / "tokenizer")
    config = MPTConfig.model_validate(
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            "vocab_size": 384,
            "no_bias": True,
            "attn_config": {"alibi": True},
            "init_config": {"name": "baseline_", "init_std": 0.2},
        }
    )
    torch.manual_seed(1)
    weights = MPT(config).state_dict()
    (place / "export").mkdir()
    write_hf_folder(place / "export", config, weights, dtype="float32", tokenizer=place / "tokenizer")
    return place / "export"


@pytest.mark.parametrize(
    ("head", "new"),
    [
        ("MptModel", set()),
        ("MptForCausalLM", set()),
        ("MptForSequenceClassification", {"score.weight"}),
        ("MptForTokenClassification", {"classifier.weight", "classifier.bias"}),
        ("MptForQuestionAnswering", {"qa_outputs.weight", "qa_outputs.bias"}),
    ],
)
def test_every_head_of_transformers_has_the_weights(exported: Path, head: str, new: set[str]) -> None:
    import transformers
    from safetensors.torch import load_file

    model, info = getattr(transformers, head).from_pretrained(exported, output_loading_info=True)
    assert set(info["missing_keys"]) == new
    assert not info["unexpected_keys"]
    backbone = model if head == "MptModel" else model.transformer
    found = {f"transformer.{name}": value for name, value in backbone.state_dict().items()}
    stored = load_file(exported / "model.safetensors")
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)
    out = model(input_ids=torch.arange(2, 12)[None])
    assert all(torch.isfinite(value).all() for value in out.values() if isinstance(value, torch.Tensor))


def test_pipeline_writes_on_and_answers(exported: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    pipe = pipeline("text-generation", model=str(exported), device="cpu")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)

    def wanted(prompt: str) -> str:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        answer = model.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids.input_ids.shape[1] :]
        return str(tokenizer.decode(answer, skip_special_tokens=True))

    (written,) = pipe("the quick", max_new_tokens=5, do_sample=False, return_full_text=False)
    assert written["generated_text"] == wanted("the quick")
    talk = [{"role": "user", "content": "the quick"}]
    (answered,) = pipe(talk, max_new_tokens=5, do_sample=False)
    rendered = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert "<|im_start|>user\nthe quick<|im_end|>" in rendered
    assert answered["generated_text"][-1] == {"role": "assistant", "content": wanted(rendered)}


SERVER = ("fastapi", "uvicorn", "openai")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in SERVER), reason="needs transformers[serving] (openai, fastapi)"
)
def test_transformers_serve_answers(exported: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", str(exported)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

    def ask(path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/{path}",
            json.dumps(body).encode() if body else None,
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return dict(json.load(answer))

    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True) as server,
    ):
        try:
            deadline = time.monotonic() + 180
            while True:
                assert server.poll() is None, (tmp_path / "log").read_text()
                try:
                    ask("health")  # not v1/models, which fails where there is no cache of the hub
                    break
                except URLError:
                    assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                    time.sleep(1)
            chat = ask(
                "v1/chat/completions",
                model=str(exported),
                messages=[{"role": "user", "content": "the quick"}],
                max_tokens=5,
                temperature=0,
                stream=False,
            )
            plain = ask("v1/completions", model=str(exported), prompt="the quick", max_tokens=5, temperature=0)
        finally:
            os.killpg(server.pid, signal.SIGTERM)
    assert chat["choices"][0]["message"]["role"] == "assistant"
    assert chat["choices"][0]["message"]["content"]
    assert chat["usage"]["completion_tokens"] == 5
    assert plain["choices"][0]["text"]
