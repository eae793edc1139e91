"""Files of weights, read tensor by tensor: what is in them, and what must not pass for it."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmtrain.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from llmtrain.checkpoint.torch_file import TorchFileTensors, open_torch_file
from llmtrain.checkpoint.torch_file_writer import write_torch_file
from llmtrain.checkpoint.weights import InMemory, Joined, Renamed, Weights, equal, fill
from llmtrain.checkpoint.weights_files import open_tensors, shards, size_in_bytes, write_weights
from llmtrain.errors import UserError


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(5, 7),
        "b": torch.randn(64).bfloat16(),
        "half": torch.randn(3, 3, 3).half(),
        "double": torch.randn(2, 2).double(),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
    }


def same(found: Weights, wanted: dict[str, Tensor]) -> bool:
    return list(found) == list(wanted) and all(
        found[n].dtype == found.dtype(n) == wanted[n].dtype
        and found[n].shape == found.shape(n) == wanted[n].shape
        and torch.equal(found[n], wanted[n])
        for n in wanted
    )


class TestTorchFiles:
    def test_all_that_torch_saves(self, tmp_path: Path) -> None:
        """Views, transposed tensors, parameters, a storage that several share: all as torch.load gives them."""
        whole = torch.randn(6, 8)
        saved: dict[str, Tensor] = {
            **tensors(),
            "whole": whole,
            "rows": whole[2:4],
            "columns": whole[:, 3:5],
            "transposed": whole.t(),
            "strided": whole[::2, ::3],
            "parameter": torch.nn.Parameter(torch.randn(4)),
            "expanded": torch.randn(1, 3).expand(4, 3),
            "ids": torch.arange(5),
            "float8": torch.randn(4).to(torch.float8_e4m3fn),
        }
        torch.save(saved, tmp_path / "x.pt")
        found = open_torch_file(tmp_path / "x.pt")
        assert isinstance(found, TorchFileTensors)
        for name, value in saved.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name].double(), value.double()), name
            assert found[name].is_contiguous()
        found["whole"].zero_()  # memory of its own, each time
        assert torch.equal(found["whole"], whole)

    def test_a_tied_head_is_known_without_reading_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        table = torch.randn(6, 4)
        saved = {"table": table, "head": table, "copy": table.clone(), "part": table[:3], "other": table + 1}
        torch.save(saved, tmp_path / "x.pt")
        found = open_torch_file(tmp_path / "x.pt")
        assert found is not None
        assert [equal(found, "table", name) for name in saved] == [True, True, True, False, False]
        monkeypatch.setattr(TorchFileTensors, "__getitem__", None)
        assert equal(found, "table", "head")

    def test_nested_dicts_and_what_is_none(self, tmp_path: Path) -> None:
        torch.save({"state": {"model": tensors(), "step": 3}}, tmp_path / "x.pt")
        found = open_torch_file(tmp_path / "x.pt", ("state", "model"), ())
        assert found is not None
        assert same(found, tensors())
        assert open_torch_file(tmp_path / "x.pt", ("state",)) is None
        assert open_torch_file(tmp_path / "x.pt") is None

    def test_the_format_before_torch_1_6(self, tmp_path: Path) -> None:
        torch.save(tensors(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        found = open_torch_file(tmp_path / "old.pt")
        assert found is not None
        assert same(found, tensors())

    def test_ours_is_a_sound_archive_and_always_the_same_bytes(self, tmp_path: Path) -> None:
        content = tensors()
        for name in ("x.pt", "y.pt"):
            write_torch_file(tmp_path / name, InMemory(content), list(content), lambda t: {"state": {"model": t}})
        assert (tmp_path / "x.pt").read_bytes() == (tmp_path / "y.pt").read_bytes()
        assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None
        for mapped in (True, False):
            found = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mapped)["state"]["model"]
            assert all(torch.equal(found[n], v) and found[n].dtype == v.dtype for n, v in content.items())
            assert all(v.data_ptr() % 64 == 0 for v in found.values() if mapped)

    @pytest.mark.parametrize("keep", [0.3, 0.7, 0.999])
    def test_cut_off(self, tmp_path: Path, keep: float) -> None:
        torch.save(tensors(), tmp_path / "x.pt")
        data = (tmp_path / "x.pt").read_bytes()
        (tmp_path / "x.pt").write_bytes(data[: int(len(data) * keep)])
        with pytest.raises(UserError, match=r"x\.pt: cannot be read, it is damaged"):
            open_torch_file(tmp_path / "x.pt")

    def test_cut_off_after_it_was_opened(self, tmp_path: Path) -> None:
        torch.save({"x": torch.randn(1000)}, tmp_path / "x.pt")
        found = open_torch_file(tmp_path / "x.pt")
        assert found is not None
        os.truncate(tmp_path / "x.pt", 900)
        with pytest.raises(UserError, match="in the middle of a tensor"):
            found["x"]

    @pytest.mark.parametrize("shape", [(64, 64), (2**40,)], ids=["beyond", "huge"])
    def test_a_tensor_larger_than_its_bytes(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        """The pickle may say anything: here a shape that its storage cannot hold."""
        torch.save({"x": torch.randn(16)}, tmp_path / "x.pt")
        with zipfile.ZipFile(tmp_path / "x.pt") as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        pickled = next(name for name in records if name.endswith("data.pkl"))
        size = pickle.dumps(shape, protocol=2)[2:-1].replace(b"q\x00", b"")
        records[pickled] = records[pickled].replace(b"K\x10\x85", size, 1)
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            for name, content in records.items():
                archive.writestr(name, content)
        with pytest.raises(UserError, match=r"beyond its bytes|damaged"):
            dict(open_torch_file(tmp_path / "x.pt") or {})

    def test_code_is_refused_by_name(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> Any:
                return os.system, (f"touch {tmp_path / 'ran'}",)

        torch.save({**tensors(), "x": Evil()}, tmp_path / "x.pt")
        with pytest.raises(UserError, match=r"posix\.system"):
            open_torch_file(tmp_path / "x.pt")
        assert not (tmp_path / "ran").exists()

    def test_compressed_records_are_no_checkpoint(self, tmp_path: Path) -> None:
        torch.save({"x": torch.zeros(10_000)}, tmp_path / "x.pt")
        with (
            zipfile.ZipFile(tmp_path / "x.pt") as old,
            zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for name in old.namelist():
                new.writestr(name, old.read(name))
        with pytest.raises(UserError, match=r"y\.pt"):
            dict(open_torch_file(tmp_path / "y.pt") or {})


def header(path: Path, content: Any, data: bytes = b"", length: int | None = None) -> None:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(begin: int, end: int, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


class TestSafetensors:
    def test_there_and_back_with_the_package(self, tmp_path: Path) -> None:
        content = tensors()
        write_safetensors(tmp_path / "ours.safetensors", InMemory(content), list(content))
        found = load_file(tmp_path / "ours.safetensors")
        assert all(torch.equal(found[n], v) and found[n].dtype == v.dtype for n, v in content.items())
        save_file(content, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
        assert same(Renamed(SafetensorsFile(tmp_path / "theirs.safetensors"), {n: n for n in content}), content)
        assert same(SafetensorsFile(tmp_path / "ours.safetensors"), content)

    @pytest.mark.parametrize(
        ("write", "says"),
        [
            (lambda p: p.write_bytes(b""), "a header of 0 bytes in a file of 0"),
            (lambda p: p.write_bytes(b"\x01\x00"), "in a file of 2"),
            (lambda p: header(p, {}, length=10**15), "a header of 1,000,000,000,000,000 bytes"),
            (lambda p: header(p, b"{broken"), "no JSON"),
            (lambda p: header(p, b"\xff\xfe{}"), "no JSON"),
            (lambda p: header(p, [1]), "no JSON object"),
            (lambda p: header(p, {"x": 3}), "`x`: 3"),
            (lambda p: header(p, {"x": entry(0, 8, dtype="F77")}, b"0" * 8), "`x`: .*F77"),
            (lambda p: header(p, {"x": entry(0, 8, (3,))}, b"0" * 8), "`x`: "),
            (lambda p: header(p, {"x": entry(0, -8, (-2,))}, b"0" * 8), "`x`: "),
            (lambda p: header(p, {"x": entry(0, 8, (1.0, 2.0))}, b"0" * 8), "`x`: "),
            (lambda p: header(p, {"x": entry(0, 8, (True, 2))}, b"0" * 8), "`x`: "),
            (lambda p: header(p, {"x": entry(0, 8)}, b"0" * 7), "have 8 bytes and the file holds 7"),
            (lambda p: header(p, {"x": entry(0, 8)}, b"0" * 9), "have 8 bytes and the file holds 9"),
            (lambda p: header(p, {"x": entry(0, 2**50, (2**48,))}, b"0" * 8), "the file holds 8"),
            (lambda p: header(p, {"x": entry(0, 8), "y": entry(4, 12)}, b"0" * 12), "`y` begins at byte 4 "),
            (lambda p: header(p, {"x": entry(0, 8), "y": entry(0, 8)}, b"0" * 16), "`y` begins at byte 0 "),
            (lambda p: header(p, {"x": entry(0, 8), "y": entry(9, 17)}, b"0" * 17), "`y` begins at byte 9 "),
        ],
    )
    def test_a_header_that_does_not_describe_the_file(
        self, tmp_path: Path, write: Callable[[Path], None], says: str
    ) -> None:
        write(tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=rf"x\.safetensors: cannot be read, the file is damaged .*{says}"):
            SafetensorsFile(tmp_path / "x.safetensors")


class TestFolders:
    @pytest.mark.parametrize("kind", ["safetensors", "bin"])
    @pytest.mark.parametrize("limit", [1, 200, 10**9])
    def test_one_file_or_several(self, tmp_path: Path, kind: Any, limit: int) -> None:
        content = {name: value for name, value in tensors().items() if name != "empty"}
        write_weights(tmp_path, InMemory(content), limit, kind)
        files = sorted(file.name for file in tmp_path.glob(f"*.{kind}"))
        stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
        expected = {1: 5, 200: 3, 10**9: 1}[limit]
        if expected == 1:
            assert files == [f"{stem}.{kind}"]
        else:
            assert files == [f"{stem}-{n:05d}-of-{expected:05d}.{kind}" for n in range(1, expected + 1)]
            index = json.loads((tmp_path / f"{stem}.{kind}.index.json").read_text())
            assert index["metadata"]["total_size"] == sum(v.nbytes for v in content.values())
            assert sorted(set(index["weight_map"].values())) == files
        assert same(Renamed(open_tensors(tmp_path), {n: n for n in content}), content)

    def test_an_index_and_files_that_do_not_agree(self, tmp_path: Path) -> None:
        content = {name: value for name, value in tensors().items() if name != "empty"}
        write_weights(tmp_path, InMemory(content), 1, "safetensors")
        index = tmp_path / "model.safetensors.index.json"
        good = json.loads(index.read_text())

        def refused(match: str, weight_map: Any) -> None:
            index.write_text(json.dumps({**good, "weight_map": weight_map}))
            with pytest.raises(UserError, match=match):
                open_tensors(tmp_path)

        named = good["weight_map"]
        refused("its files do not hold `z`", {**named, "z": named["a"]})
        refused("its files do not hold `a`", {**named, "a": named["b"]})
        write_weights(tmp_path, InMemory(content), 200, "safetensors")
        two = json.loads(index.read_text())["weight_map"]
        refused("its index does not name `b` and 0 others", {name: file for name, file in two.items() if name != "b"})
        refused("`../x.safetensors` is no name of a file in this folder", {**named, "a": "../x.safetensors"})
        refused("`/etc/passwd` is no name", {**named, "a": "/etc/passwd"})
        refused("no-such.safetensors: missing", {**named, "a": "no-such.safetensors"})
        refused("has no weight_map", [])
        index.write_text("{")
        with pytest.raises(UserError, match="cannot be read"):
            open_tensors(tmp_path)

    def test_a_tensor_in_two_files(self) -> None:
        with pytest.raises(UserError, match="here: `a` is in two of its files"):
            Joined([InMemory(tensors()), InMemory({"a": torch.zeros(1)})], "here")

    def test_a_file_with_more_than_tensors(self, tmp_path: Path) -> None:
        torch.save({**tensors(), "step": 3}, tmp_path / "pytorch_model.bin")
        with pytest.raises(UserError, match="holds more than tensors"):
            open_tensors(tmp_path)

    def test_cut_into_parts_in_order(self) -> None:
        weights = InMemory({name: torch.zeros(n, dtype=torch.uint8) for name, n in (("a", 4), ("b", 9), ("c", 3))})
        assert shards(weights, 7) == [["a"], ["b"], ["c"]]
        assert shards(weights, 13) == [["a", "b"], ["c"]]
        assert shards(InMemory({}), 5) == [[]]

    @pytest.mark.parametrize(
        ("text", "wanted"), [("5GB", 5 * 10**9), ("2GiB", 2**31), ("1.5mb", 1_500_000), (7, 7), ("7 B", 7)]
    )
    def test_sizes(self, text: str | int, wanted: int) -> None:
        assert size_in_bytes(text) == wanted


def test_looking_at_weights_reads_nothing() -> None:
    class Unreadable(InMemory):
        def __getitem__(self, name: str) -> Tensor:
            raise AssertionError(name)

    weights = Renamed(Joined([Unreadable(tensors())], "x"), {f"x.{name}": name for name in tensors()})
    assert "x.a" in weights
    assert "a" not in weights
    assert weights.total_size() == sum(value.nbytes for value in tensors().values())
    assert weights.shapes()["x.a"] == (5, 7)
    with pytest.raises(AssertionError, match="a"):
        weights["x.a"]


def test_a_model_is_filled_in_place_in_its_own_dtype() -> None:
    model = torch.nn.Linear(3, 2).bfloat16()
    before = model.weight.data_ptr()
    new = {name: torch.randn(value.shape) for name, value in model.state_dict().items()}
    fill(model.state_dict(), InMemory(new))
    assert model.weight.data_ptr() == before
    assert all(torch.equal(value, new[name].bfloat16()) for name, value in model.state_dict().items())
