"""Exports go elsewhere: a folder, S3, a hub; over bad connections, and compared afterwards."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from llmtrain.checkpoint import push as push_module
from llmtrain.checkpoint.push import files_of, push, reach
from llmtrain.errors import UserError
from llmtrain.prep.stores import open as opening
from llmtrain.prep.stores import retry
from llmtrain.testing.hub import TOKEN, FakeHub, fake_hub
from llmtrain.testing.remote import CuttingProxy


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """What an export consists of, as far as moving it is concerned."""
    folder = tmp_path / "export"
    folder.mkdir()
    for name in ("config.json", "README.md", "tokenizer.json", "llmtrain_export.json", "model.safetensors.index.json"):
        (folder / name).write_text(f'{{"{name}": 1}}')
    for number in (1, 2):
        (folder / f"model-0000{number}-of-00002.safetensors").write_bytes(bytes([number]) * 300_000)
    (folder / ".hidden").write_text("x")
    return folder


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.001)
    monkeypatch.setenv("LLMTRAIN_STORAGE_ATTEMPTS", "6")


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_of(folder)}


def test_what_opens_an_export_is_written_last(export: Path) -> None:
    names = files_of(export)
    assert names[-3:] == ["llmtrain_export.json", "model.safetensors.index.json", "config.json"]
    assert len(names) == 7
    assert ".hidden" not in names


class TestFolder:
    def test_it_arrives_and_is_replaced_only_where_that_is_meant(self, export: Path, tmp_path: Path) -> None:
        target = tmp_path / "far" / "model"
        assert "7 files" in str(push(export, str(target)))
        assert content(target) == content(export)
        assert "already" in str(push(export, str(target), overwrite=False))
        (export / "config.json").write_text("{}")
        with pytest.raises(UserError, match="--overwrite"):
            push(export, str(target), overwrite=False)
        push(export, str(target))
        assert content(target) == content(export)
        assert [path.name for path in target.parent.iterdir()] == ["model"]

    def test_other_files_are_not_touched(self, export: Path, tmp_path: Path) -> None:
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "a.txt").write_text("x")
        with pytest.raises(UserError, match="holds other files"):
            push(export, str(tmp_path / "thesis"))
        (tmp_path / "file").write_text("x")
        with pytest.raises(UserError, match="is a file"):
            push(export, str(tmp_path / "file"))
        with pytest.raises(UserError, match="cannot be written"):
            push(export, str(tmp_path / "file" / "below"))
        with pytest.raises(UserError, match="is no export"):
            push(tmp_path / "thesis", str(tmp_path / "x"))
        push(export, str(tmp_path / "y"))
        (tmp_path / "y" / "thesis.txt").write_text("x")
        (export / "config.json").write_text("{}")
        with pytest.raises(UserError, match=r"holds thesis\.txt, which no export has written"):
            push(export, str(tmp_path / "y"))


class TestS3:
    @pytest.fixture
    def bucket(self, s3: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
        from boto3.session import Session

        keys = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
        for key, value in keys.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setenv("S3_ENDPOINT_URL", s3)
        monkeypatch.setattr(opening, "_opened", {})
        name = f"bucket-{abs(hash(request.node.name))}"
        Session().client("s3", endpoint_url=s3).create_bucket(Bucket=name)
        return name

    def stored(self, s3: str, bucket: str, prefix: str) -> dict[str, bytes]:
        from boto3.session import Session

        client = Session().client("s3", endpoint_url=s3)
        found = client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
        return {
            one["Key"].removeprefix(prefix): client.get_object(Bucket=bucket, Key=one["Key"])["Body"].read()
            for one in found
        }

    def test_over_a_connection_that_breaks(
        self, export: Path, s3: str, bucket: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with CuttingProxy(int(urlsplit(s3).port or 0), every=2, after=100_000) as proxy:
            monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
            done = push(export, f"s3://{bucket}/models/mine")
            assert proxy.cuts > 0
        assert "size and hash" in str(done)
        assert self.stored(s3, bucket, "models/mine/") == content(export)

    def test_never_half_an_export_that_looks_whole(
        self, export: Path, s3: str, bucket: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url = f"s3://{bucket}/m"
        push(export, url)
        (export / "model-00002-of-00002.safetensors").rename(export / "model-00002-of-00003.safetensors")
        (export / "config.json").write_text('{"another": 1}')
        with pytest.raises(UserError, match="--overwrite"):
            push(export, url, overwrite=False)
        real = push_module._put

        def fails_at_the_weights(store, path, file, doing):  # type: ignore[no-untyped-def]
            if path.endswith("00003.safetensors"):
                raise UserError("cut")
            real(store, path, file, doing)

        with monkeypatch.context() as patch:
            patch.setattr(push_module, "_put", fails_at_the_weights)
            with pytest.raises(UserError, match="cut"):
                push(export, url)
        assert "config.json" not in self.stored(s3, bucket, "m/")
        push(export, url)
        assert self.stored(s3, bucket, "m/") == content(export)

    def test_files_of_others_stay_and_those_of_an_earlier_export_go(self, export: Path, s3: str, bucket: str) -> None:
        others = {"lora.safetensors": b"theirs", "data.bin": b"theirs", "notes.txt": b"theirs"}
        for name, text in others.items():
            opening.open_store(f"s3://{bucket}/")[0].put(f"m/{name}", text)
        push(export, f"s3://{bucket}/m", overwrite=False)
        assert self.stored(s3, bucket, "m/") == content(export) | others
        (export / "chat_template.jinja").write_text("of the earlier one")
        push(export, f"s3://{bucket}/m")
        (export / "chat_template.jinja").unlink()
        with pytest.raises(UserError, match="--overwrite"):
            push(export, f"s3://{bucket}/m", overwrite=False)
        push(export, f"s3://{bucket}/m")
        assert self.stored(s3, bucket, "m/") == content(export) | others
        with pytest.raises(UserError, match="s3://: expected s3://PLACE/PATH"):
            push(export, "s3://")
        with pytest.raises(UserError, match="needs a destination"):
            push(export, " ")

    def test_nothing_is_replaced_unasked_where_no_export_stands(self, export: Path, s3: str, bucket: str) -> None:
        others = {"README.md": b"of a data set", "model-00001-of-00007.safetensors": b"theirs"}
        for name, text in others.items():
            opening.open_store(f"s3://{bucket}/")[0].put(f"m/{name}", text)
        with pytest.raises(UserError, match=r"holds model-00001-of-00007\.safetensors, README\.md already"):
            push(export, f"s3://{bucket}/m", overwrite=False)
        assert self.stored(s3, bucket, "m/") == others

    def test_what_arrives_is_compared(self, export: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        real = push_module._put

        def spoils_one(store, path, file, doing):  # type: ignore[no-untyped-def]
            if path.endswith("tokenizer.json"):
                store.put(path, bytes(file.stat().st_size))
            else:
                real(store, path, file, doing)

        monkeypatch.setattr(push_module, "_put", spoils_one)
        with pytest.raises(UserError, match=r"did not arrive as it was sent: tokenizer\.json has another hash"):
            push(export, f"s3://{bucket}/m")
        # Where a bucket encrypts with keys of its own, no tag is an MD5.
        monkeypatch.setattr(push_module, "same_content", lambda file, stored: False)
        assert "not all MD5s are known" in str(push(export, f"s3://{bucket}/m"))

    def test_what_is_there_already_is_not_sent_again(
        self, export: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        push(export, f"s3://{bucket}/m")
        monkeypatch.setattr(push_module, "_put", None)
        push(export, f"s3://{bucket}/m", overwrite=False)

    def test_a_bucket_that_is_not_there(self, export: Path, bucket: str) -> None:
        with pytest.raises(UserError, match="no such bucket"):
            push(export, "s3://nowhere/m")
        assert "can be written" in reach(f"s3://{bucket}/m")
        with pytest.raises(UserError, match="no such bucket"):
            reach("s3://nowhere/m")


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # which the server does not speak
        monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
        with fake_hub() as hub:
            for key, value in hub.environment.items():
                monkeypatch.setenv(key, value)
            monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # read when huggingface_hub was imported
            yield hub

    def test_one_commit_after_failures(self, export: Path, hub: FakeHub) -> None:
        hub.failures = {"/api/repos/create": [500, 500], "/commit/": [500, 500], "/preupload/": [503]}
        done = push(export, "hf://me/model")
        assert "size and hash" in str(done)
        assert hub.private == {"me/model": True}
        del hub.repositories["me/model"][".gitattributes"]
        assert hub.repositories["me/model"] == content(export)
        assert len(hub.commits) == 1
        # A second one replaces what readers would open with it and is no part of it, and leaves what else is there.
        hub.repositories["me/model"] |= {"picture.png": b"x", "adapter_config.json": b"{}", "chat_template.jinja": b"x"}
        (export / "model-00002-of-00002.safetensors").rename(export / "model-00002-of-00003.safetensors")
        push(export, "hf://me/model")
        assert hub.repositories["me/model"] == content(export) | {"picture.png": b"x"}

    def test_a_public_one_is_asked_for(self, export: Path, hub: FakeHub) -> None:
        push(export, "hf://me/open", private=False)
        assert hub.private == {"me/open": False}

    @pytest.mark.parametrize(("code", "message"), [(401, "does not accept the token"), (403, "may not write")])
    def test_what_stays_is_not_tried_again(self, export: Path, hub: FakeHub, code: int, message: str) -> None:
        hub.failures = {"/preupload/": [code]}
        with pytest.raises(UserError, match=message) as caught:
            push(export, "hf://me/model")
        assert TOKEN not in str(caught.value)
        assert sum("/preupload/" in request for request in hub.requests) == 1
        assert hub.commits == []

    def test_what_arrives_is_compared(self, export: Path, hub: FakeHub) -> None:
        hub.spoil = True
        with pytest.raises(UserError, match="did not arrive as it was sent: README"):
            push(export, "hf://me/model")

    def test_no_token_no_network_no_name(self, export: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UserError, match="hf://USER/REPOSITORY"):
            push(export, "hf://model")
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setenv("LLMTRAIN_STORAGE_ATTEMPTS", "2")
        with pytest.raises(UserError, match=r"failed 2 times.*cannot be reached"):
            push(export, "hf://me/model")
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(UserError, match="HF_TOKEN"):
            push(export, "hf://me/model")

    def test_who_we_are(self, hub: FakeHub) -> None:
        assert "of me" in reach("hf://me/model")
        hub.role = "read"
        with pytest.raises(UserError, match="can only read"):
            reach("hf://me/model")

    def test_trying_a_place_does_not_take_as_long_as_a_push(self, hub: FakeHub) -> None:
        hub.failures = {"/whoami": [500] * 9}
        with pytest.raises(UserError, match="failed 3 times"):
            reach("hf://me/model")
