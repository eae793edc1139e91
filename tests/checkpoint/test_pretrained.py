"""`model.pretrained`: whatever it names, the recipe gets its keys and the model its weights."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.checkpoint.export import export
from llmtrain.checkpoint.fetch import cached
from llmtrain.checkpoint.pretrained import fetch, fill_model, pretrained_config, read_pretrained
from llmtrain.errors import UserError
from llmtrain.model.config import MPTConfig

SHAPE = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 384, "no_bias": True}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


def read(pretrained: str | Path, **model: Any) -> tuple[MPTConfig, dict[str, torch.Tensor]]:
    """As a recipe would that leaves out everything but `model`."""
    block = fill_model({"pretrained": str(pretrained), **model})
    config = MPTConfig.model_validate(block)
    return config, read_pretrained(fetch(str(pretrained)), config)


@pytest.fixture
def hf(run, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A Hugging Face folder with three weight files and a file of code that nobody may fetch."""
    _, weights = run.save()
    export(run.folder, tmp_path / "hf", max_shard_size=40_000)
    (tmp_path / "hf" / "modeling_evil.py").write_text("raise SystemExit")
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"a second copy")
    return tmp_path / "hf", weights


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class TestLocal:
    @pytest.mark.parametrize("kind", ["sharded", "full"])
    def test_a_run_a_checkpoint_or_a_file(self, run, kind: str) -> None:
        path, weights = run.save(kind=kind)
        places = [run.folder, run.folder / "checkpoints", path, *([path / "full.pt"] if kind == "full" else [])]
        for place in places:
            config, found = read(place)
            assert {key: getattr(config, key) for key in SHAPE} == SHAPE
            assert same(found, weights)

    def test_a_hugging_face_folder(self, hf) -> None:
        config, found = read(hf[0])
        assert config.attn_config.alibi
        assert same(found, hf[1])

    def test_bin_of_the_older_layout(self, hf) -> None:
        folder, weights = hf
        for file in folder.glob("model*"):
            file.unlink()
        older = {name.removeprefix("transformer."): value for name, value in weights.items()}
        torch.save(older, folder / "pytorch_model.bin")
        content = json.loads((folder / "config.json").read_text())
        content |= {"architectures": ["MPTForCausalLM"], "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"}}
        content["attn_config"] = {"alibi": True, "alibi_bias_max": 16, "clip_qkv": 6, "attn_uses_sequence_id": False}
        (folder / "config.json").write_text(json.dumps(content))
        config, found = read(folder, attn_config={"attn_uses_sequence_id": True})
        assert (config.attn_config.alibi_bias_max, config.attn_config.clip_qkv) == (16, 6)
        assert config.attn_config.attn_uses_sequence_id
        assert same(found, weights)

    def test_another_trainers_file_has_no_config(self, run, tmp_path: Path) -> None:
        path, weights = run.save(kind="full")
        alone = tmp_path / "theirs.pt"
        shutil.copyfile(path / "full.pt", alone)
        assert pretrained_config(str(alone)) == {}
        _, found = read(alone, **SHAPE, attn_config={"alibi": True}, max_seq_len=64)
        assert same(found, weights)
        _, found = read(alone, **{**SHAPE, "vocab_size": 512}, attn_config={"alibi": True}, max_seq_len=64)
        assert found["transformer.wte.weight"].shape == (512, 32)
        with pytest.raises(UserError, match="other shape"):
            read(alone, **{**SHAPE, "d_model": 64}, attn_config={"alibi": True}, max_seq_len=64)

    def test_nothing_there(self, tmp_path: Path) -> None:
        for name in (str(tmp_path / "x"), "./x", "a/b/c", "x.pt"):
            with pytest.raises(UserError, match="nothing is at"):
                fetch(name)

    def test_a_name_too_long_for_a_file(self) -> None:
        with pytest.raises(UserError):
            fetch("x" * 400)


class TestTheRecipesKeys:
    def test_a_config_that_is_no_object(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("[]")
        with pytest.raises(UserError, match="expected a JSON object"):
            pretrained_config(str(tmp_path))

    def test_what_it_says_wins_and_the_rest_is_filled_in(self, run) -> None:
        run.save(attn_config={"alibi": True, "clip_qkv": 6, "attn_pdrop": 0.3}, resid_pdrop=0.4, norm_eps=1e-4)
        block = fill_model(
            {"pretrained": str(run.folder), "resid_pdrop": 0.1, "attn_config": {"attn_impl": "eager"}, "max_seq_len": 9}
        )
        config = MPTConfig.model_validate(block)
        assert (config.resid_pdrop, config.attn_config.attn_impl, config.max_seq_len) == (0.1, "eager", 9)
        assert (config.d_model, config.attn_config.clip_qkv, config.norm_eps) == (32, 6, 1e-4)
        assert config.attn_config.attn_pdrop == 0  # a matter of training

    def test_a_vocabulary_grows_with_the_tokenizer(self, run) -> None:
        _, weights = run.save()
        block = fill_model({"pretrained": str(run.folder)}, tokens=386)
        found = read_pretrained(run.folder, MPTConfig.model_validate(block))
        assert block["vocab_size"] == 512
        assert found["transformer.wte.weight"].shape == (512, 32)
        assert torch.equal(found["transformer.wte.weight"][:384], weights["transformer.wte.weight"])
        assert fill_model({"pretrained": str(run.folder)}, tokens=384)["vocab_size"] == 384

    def test_learned_positions_keep_their_number(self, run) -> None:
        _, weights = run.save(attn_config={"alibi": False})
        config, found = read(run.folder)
        assert config.max_seq_len == 64
        assert same(found, weights)
        with pytest.raises(UserError, match=r"model.max_seq_len is 32 in the recipe and 64 in the weights"):
            read(run.folder, max_seq_len=32)

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            ({"n_heads": 2}, "model.n_heads is 2 in the recipe and 4 in the weights"),  # fits, and is another function
            ({"n_layers": 3, "no_bias": False}, "model.n_layers is 3 .*model.no_bias is False"),
            ({"attn_config": {"alibi": False}}, "model.attn_config.alibi is False"),
            ({"expansion_ratio": 2}, "model.ffn_config.ffn_hidden_size is 64 in the recipe and 128"),
            ({"tie_word_embeddings": False}, "model.tie_word_embeddings is False"),
            ({"norm_type": "rmsnorm"}, "model.norm_type is rmsnorm in the recipe and layernorm"),
            ({"attn_config": {"attn_type": "multiquery_attention"}}, "model.attn_config.kv_n_heads is 1 .* and 4 in"),
            ({"attn_config": {"alibi": False, "rope": True}}, "model.attn_config.rope is True in the recipe and False"),
            ({"head_dim": 16}, "model.head_dim is 16 in the recipe and 8 in the weights"),
            ({"ffn_config": {"ffn_type": "mptglu"}}, "model.ffn_config.ffn_type is mptglu in the recipe"),
            ({"attn_config": {"qk_gn": True}}, "model.attn_config.qk_gn is True in the recipe"),
            ({"vocab_size": 256}, "model.vocab_size: 256 is less than the 384"),
        ],
    )
    def test_another_model_is_refused_by_key(self, run, model: dict, message: str) -> None:
        run.save()
        with pytest.raises(UserError, match=message):
            read(run.folder, **model)

    def test_published_changes_are_said(self, run, caplog) -> None:
        """StoryWriter starts from MPT-7B with these."""
        _, weights = run.save()
        _, found = read(run.folder, attn_config={"alibi_bias_max": 16, "clip_qkv": 6}, norm_type="layernorm")
        assert same(found, weights)
        assert "model.attn_config.alibi_bias_max is 16.0 in the recipe and 8.0 in the weights" in caplog.text
        assert "norm_type" not in caplog.text

    def test_a_complete_block_needs_no_source(self, run) -> None:
        """A run's own recipe.yaml still reads when the base model is gone."""
        run.save()
        block = MPTConfig.model_validate(fill_model({"pretrained": str(run.folder)})).model_dump(mode="json")
        shutil.rmtree(run.folder)
        assert fill_model(block) == block

    def test_imports_no_torch(self, run) -> None:
        run.save()
        code = (
            "import sys; from llmtrain.checkpoint.pretrained import fill_model;"
            f"print(fill_model({{'pretrained': {str(run.folder)!r}}})['d_model'], {{'torch'}} & set(sys.modules))"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "32 set()"


class TestHub:
    @pytest.fixture
    def hub(self, hf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The hub's local cache as its client lays it out; no network."""
        from huggingface_hub import constants

        repo = tmp_path / "hub" / "models--mosaicml--mpt-tiny"
        shutil.copytree(hf[0], repo / "snapshots" / "0123abc")
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("0123abc")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        return repo

    def test_a_name_is_read_from_the_cache(self, hub: Path, hf) -> None:
        config, found = read("mosaicml/mpt-tiny")
        assert config.d_model == 32
        assert same(found, hf[1])
        assert fetch("mosaicml/mpt-tiny@main") == hub / "snapshots" / "0123abc"

    def test_a_name_that_is_not_there(self, hub: Path) -> None:
        with pytest.raises(UserError, match=r"'mosaicml/mpt-7b' is no local path.*hf download mosaicml/mpt-7b"):
            fetch("mosaicml/mpt-7b")

    def test_a_part_that_is_not_there(self, hub: Path) -> None:
        next((hub / "snapshots" / "0123abc").glob("model-00002*")).unlink()
        with pytest.raises(UserError, match=r"model-00002-of-.* is missing"):
            fetch("mosaicml/mpt-tiny")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """`tmp_path` over HTTP, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def send_head(self) -> Any:
            asked.append(f"{self.command} {self.path}")
            return super().send_head()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


class TestStores:
    def test_a_folder_is_downloaded_once_and_only_what_is_needed(self, hf, tmp_path: Path, served) -> None:
        uri, asked = served[0] + "/hf", served[1]
        assert fill_model({"pretrained": uri})["d_model"] == 32
        assert asked == ["GET /hf/config.json"]
        _, found = read(uri)
        assert same(found, hf[1])
        names = {file.name for file in cached(uri).iterdir()}
        assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
        assert not {"modeling_evil.py", "pytorch_model.bin"} & names
        asked.clear()
        assert same(read(uri)[1], hf[1])
        assert asked == []
        assert len(list(cached(uri).parent.iterdir())) == 1

    @pytest.mark.parametrize("kind", ["sharded", "full"])
    def test_a_checkpoint(self, run, kind: str) -> None:
        path, weights = run.save(kind=kind)
        assert same(read(path.as_uri())[1], weights)
        if kind == "full":
            _, found = read((path / "full.pt").as_uri(), **SHAPE, attn_config={"alibi": True}, max_seq_len=64)
            assert same(found, weights)

    def test_another_trainers_sharded_checkpoint(self, run) -> None:
        path, weights = run.save()
        (path / "manifest.json").unlink()
        _, found = read(path.as_uri(), **SHAPE, attn_config={"alibi": True}, max_seq_len=64)
        assert same(found, weights)

    def test_nothing_half_downloaded_stays(self, hf, tmp_path: Path) -> None:
        next(hf[0].glob("model-00002*")).unlink()
        with pytest.raises(UserError, match=r"model-00002-of-.* is missing"):
            fetch(hf[0].as_uri())
        assert list((tmp_path / "cache" / "llmtrain" / "pretrained").iterdir()) == []
        with pytest.raises(UserError, match=r"holds no config\.json"):
            fetch((tmp_path / "cache").as_uri())
        with pytest.raises(UserError, match="there is no such file"):
            fetch((tmp_path / "x.pt").as_uri())

    def test_a_store_that_may_not_be_listed_says_403_of_what_is_missing(
        self, hf, tmp_path: Path, served, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As S3 does without the permission s3:ListBucket."""
        say = http.server.SimpleHTTPRequestHandler.send_error
        monkeypatch.setattr(
            http.server.SimpleHTTPRequestHandler,
            "send_error",
            lambda self, code, *_: say(self, 403 if code == 404 else code),
        )
        assert same(read(served[0] + "/hf")[1], hf[1])
        with pytest.raises(UserError, match=r"holds no config\.json.*must not be read"):
            fetch(served[0] + "/other")

    def test_a_server_that_is_down(self) -> None:
        with pytest.raises(UserError, match=r"http://127.0.0.1:9/x/config.json cannot be downloaded"):
            pretrained_config("http://127.0.0.1:9/x")

    def test_an_index_cannot_name_files_elsewhere(self, hf) -> None:
        (hf[0] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../secret"}}))
        with pytest.raises(UserError, match="no name of a file in this folder"):
            fetch(hf[0].as_uri())

    def test_s3(self, hf, served, monkeypatch: pytest.MonkeyPatch) -> None:
        """Streaming's own client against a server that speaks enough of the protocol."""
        for name, value in {
            "S3_ENDPOINT_URL": served[0],
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
        }.items():
            monkeypatch.setenv(name, value)
        _, found = read("s3://hf")
        assert same(found, hf[1])
