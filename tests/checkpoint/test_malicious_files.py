"""Every door through which a file of someone else's comes in: what it says is not run, and the message says where."""

import io
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from llmtrain.checkpoint.hugging_face import write_hf_folder
from llmtrain.checkpoint.unpickle import load_full, load_object, refuse_code
from llmtrain.cli import main
from llmtrain.errors import UserError
from llmtrain.model.config import MPTConfig

RECIPE = """
max_seq_len: 64
model: {name: mpt_causal_lm, d_model: 32, n_heads: 4, n_layers: 2, vocab_size: 384, no_bias: true,
  attn_config: {alibi: true}}
tokenizer: {name: EleutherAI/gpt-neox-20b}
train_loader: {name: text, dataset: {local: data, split: train}}
optimizer: {name: decoupled_adamw, lr: 1.0e-3}
scheduler: {name: constant_with_warmup, t_warmup: 2ba}
max_duration: 4ba
global_train_batch_size: 4
device_train_microbatch_size: 4
"""
SHARD = "__0_0.distcp"


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def full(run: Any, mark: Path) -> Path:
    """Our full checkpoint, with code beside the weights."""
    path, weights = run.save(kind="full")
    state = {"model": {f"model.{n}": v for n, v in weights.items()}, "callbacks": {"x": Evil(mark)}}
    torch.save({"state": state}, path / "full.pt")
    run.seal(path, run.PLAIN, 3, "full")  # hashes do not help against whoever writes them
    return path


def foundry(run: Any, mark: Path) -> Path:
    """A lone .pt file of llm-foundry's, with code among its random states."""
    _, weights = run.save(kind="full")
    lone = run.folder.parent / "ep0-ba3-rank0.pt"
    state = {"state": {"model": {f"model.{n}": v for n, v in weights.items()}}, "rng": [{"python": Evil(mark)}]}
    torch.save(state, lone)
    (lone.parent / "recipe.yaml").write_text(RECIPE)
    return lone


def metadata(run: Any, mark: Path) -> Path:
    """A sharded checkpoint whose .metadata is code."""
    path, _ = run.save()
    (path / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    run.seal(path, run.PLAIN, 3, "sharded")
    return path


def chunk(run: Any, mark: Path) -> Path:
    """A sharded checkpoint with code where the bytes of a tensor should be."""
    path, _ = run.save()
    content = io.BytesIO()
    torch.save(Evil(mark), content)
    offset = (path / SHARD).stat().st_size
    with (path / SHARD).open("ab") as file:
        file.write(content.getvalue())
    whole = pickle.loads((path / ".metadata").read_bytes())
    name = "state.model.model.transformer.norm_f.weight"
    info = whole.storage_data[MetadataIndex(name, torch.Size([0]))]
    info.relative_path, info.offset, info.length = SHARD, offset, len(content.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(whole))
    run.seal(path, run.PLAIN, 3, "sharded")
    return path


def hugging_face(run: Any, mark: Path) -> Path:
    """A Hugging Face folder of an MPT with a .bin file."""
    _, weights = run.save(kind="full")
    folder: Path = run.folder.parent / "hf"
    folder.mkdir()
    config = MPTConfig.model_validate(run.PLAIN)
    write_hf_folder(folder, config, weights, dtype="float32", tokenizer=run.tokenizer)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({**weights, "more": Evil(mark)}, folder / "pytorch_model.bin")
    return folder


def several_bins(run: Any, mark: Path) -> Path:
    """The same in two .bin files with an index; the second is bad."""
    folder = hugging_face(run, mark)
    names = list(torch.load(folder.parent / "run/checkpoints/ep0-ba3/full.pt", weights_only=False)["state"]["model"])
    weights = {n.removeprefix("model."): torch.zeros(1) for n in names}
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00002-of-00002.bin")
    torch.save(weights, folder / "pytorch_model-00001-of-00002.bin")
    places = {n: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, n in enumerate(weights)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def llama(run: Any, mark: Path) -> Path:
    """A Hugging Face folder of another architecture, which transformers opens."""
    from transformers import LlamaConfig

    folder: Path = run.folder.parent / "llama"
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(vocab_size=384, architectures=["LlamaForCausalLM"], **sizes).save_pretrained(folder)
    for file in run.tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    torch.save({"model.norm.weight": Evil(mark)}, folder / "pytorch_model.bin")
    return folder


def adapter(run: Any, mark: Path) -> Path:
    """LoRA adapters of PEFT in a .bin file."""
    folder: Path = run.folder.parent / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(run.folder), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"x": Evil(mark)}, folder / "adapter_model.bin")
    return folder


DOORS: dict[str, tuple[Callable[[Any, Path], Path], str]] = {
    "full checkpoint": (full, "full.pt"),
    ".pt of llm-foundry": (foundry, "ep0-ba3-rank0.pt"),
    "metadata of shards": (metadata, ".metadata"),
    "a tensor in a shard": (chunk, SHARD),
    ".bin of Hugging Face": (hugging_face, "pytorch_model.bin"),
    "one of several .bin": (several_bins, "pytorch_model-00002-of-00002.bin"),
    ".bin of a Llama": (llama, "pytorch_model.bin"),
    ".bin of adapters": (adapter, "adapter_model.bin"),
}
VERBS: dict[str, Callable[[Path, Path], list[str]]] = {
    "export": lambda source, target: ["export", str(source), str(target)],
    "import": lambda source, target: ["import", str(source), str(target)],
    "generate": lambda source, target: ["generate", str(source), "--prompt", "x", "--output", str(target)],
    "eval": lambda source, target: [
        "eval",
        str(source),
        "--data",
        str(target.with_name("text.txt")),
        "--output",
        str(target),
    ],
}

NOT_TAKEN = {("import", ".bin of a Llama"), ("import", ".bin of adapters"), ("eval", ".bin of adapters")}
"""Refused before anything of it is opened."""


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("door", DOORS)
def test_nothing_is_run(
    door: str,
    verb: str,
    run: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if door == ".bin of adapters":
        pytest.importorskip("peft")
    make, file = DOORS[door]
    mark, target = tmp_path / "ran", tmp_path / "target"
    source = make(run, mark)
    (tmp_path / "x.txt").write_text("the quick brown fox")
    monkeypatch.setattr(sys, "argv", ["llmtrain", *VERBS[verb](source, target)])
    with pytest.raises(SystemExit) as exit_:
        main()
    said = capsys.readouterr().err
    assert not mark.exists(), "code of the file was run"
    assert exit_.value.code == 2, said
    assert said.count("error:") == 1, said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("target*")), "something was left behind"
    if (verb, door) in NOT_TAKEN:
        return
    assert file in said, said
    assert "posix.system" in said, said


class Calls:
    """Calls any global with any arguments when it is unpickled."""

    def __init__(self, module: str, name: str, *arguments: Any) -> None:
        self.call, self.arguments = (module, name), arguments

    def written(self) -> bytes:
        """As a pickle, whether or not the global exists here."""
        module, name = self.call
        return b"".join((b"\x80\x02", f"c{module}\n{name}\n".encode(), pickle.dumps(self.arguments, 0)[:-1], b"R."))


GADGETS = (
    ("builtins", "eval", "1"),
    ("builtins", "exec", "1"),
    ("builtins", "__import__", "os"),
    ("builtins", "getattr", "x", "y"),
    ("subprocess", "Popen", "true"),
    ("torch.storage", "_load_from_bytes", b""),  # torch.load of bytes, unpickled freely
    ("torch.hub", "load", "x"),
    ("torch.serialization", "load", "x"),
    ("numpy", "load", "x"),
    ("importlib", "import_module", "x"),
    ("pydoc", "locate", "os.system"),
    ("functools", "partial", "x"),
    ("pathlib", "PosixPath", "x"),
    ("composer.utils", "import_helpers.import_object", "os:system"),
)


@pytest.mark.parametrize("gadget", GADGETS, ids=lambda gadget: ".".join(gadget[:2]))
def test_the_list_has_none_of_the_known_ways_out(gadget: tuple[Any, ...], tmp_path: Path) -> None:
    """In the archive of torch.save, in an object of a shard, and in metadata."""
    import zipfile

    from llmtrain.checkpoint.unpickle import read_metadata

    code = Calls(*gadget).written()
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("x/data.pkl", code), ("x/byteorder", b"little"), ("x/version", b"3\n")):
            archive.writestr(name, content)
    with pytest.raises(UserError, match="refused"):
        load_full(path)
    with pytest.raises(UserError, match="refused"):
        load_object(io.BytesIO(path.read_bytes()), "x")
    (tmp_path / ".metadata").write_bytes(code)
    with pytest.raises(UserError, match=r"refused|no enum|damaged|instead of"):
        read_metadata(tmp_path)


def test_bin_files_are_looked_through_before_another_library_opens_them(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"x": Evil(mark)}, tmp_path / "adapter_model.bin")
    torch.save({"x": Evil(mark)}, tmp_path / "training_args.bin")  # nobody opens it
    with pytest.raises(UserError, match=r"adapter_model\.bin: refused, it names `posix\.system`"):
        refuse_code(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()  # that is what is opened
    refuse_code(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"x": torch.ones(2)}, tmp_path / "adapter_model.bin")
    refuse_code(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("attack", ["a pickled column", "a path out of the folder"])
@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_shards(
    attack: str, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streaming unpickles columns of the type `pkl`, and reads whatever file an index names."""
    mark = tmp_path / "ran"
    folder = shards(tmp_path / "shards", Evil(mark))
    if attack == "a path out of the folder":
        index = json.loads((folder / "index.json").read_text())
        index["shards"][0]["raw_data"]["basename"] = "../secret.mds"
        (folder / "index.json").write_text(json.dumps(index))
        (folder / "shard.00000.mds").rename(tmp_path / "secret.mds")
    monkeypatch.setattr(sys, "argv", ["llmtrain", "data", verb, str(folder)])
    with pytest.raises(SystemExit) as exit_:
        main()
    said = capsys.readouterr()
    assert not mark.exists()
    if attack == "a path out of the folder":
        assert exit_.value.code == 2
        assert "outside of its folder" in said.err
    assert "Traceback" not in said.err


def test_a_pickled_column_is_refused_by_the_loader(tmp_path: Path) -> None:
    from streaming.base.world import World

    from llmtrain.data.guarded_streaming import GuardedStream

    mark = tmp_path / "ran"
    folder = shards(tmp_path / "shards", Evil(mark))
    stream = GuardedStream(local=str(folder), download_retry=1, download_timeout=1, validate_hash="sha1")
    stream.split = ""
    with pytest.raises(UserError, match="unsafe type: pkl"):
        stream.get_shards(World.detect(), False)
    assert not mark.exists()


def shards(folder: Path, content: Any) -> Path:
    """MDS shards with one row, whose column is pickled."""
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"tokens": "pkl"}) as out:
        out.write({"tokens": content})
    return folder


def test_composer_unpickles_nowhere_else() -> None:
    """training/loading.py replaces what stands in utils/checkpoint.py; nothing imports Composer's other loader."""
    import importlib.util

    import llmtrain

    (composer,) = importlib.util.find_spec("composer").submodule_search_locations
    places = [
        str(file.relative_to(composer))
        for file in sorted(Path(composer).rglob("*.py"))
        for line in file.read_text().splitlines()
        if "torch.load(" in line or "pickle.load(" in line
    ]
    # A new version of Composer may load in more places: look at each before the list grows.
    assert places == ["checkpoint/load.py", "utils/checkpoint.py"]
    for package in (Path(composer), Path(llmtrain.__file__).parent):
        users = [file for file in package.rglob("*.py") if "composer.checkpoint" in file.read_text()]
        assert {file.relative_to(package).parts[0] for file in users} <= {"checkpoint"}
