"""How much memory a job may still use, and what happens where a copy of the weights does not fit."""

from pathlib import Path

import pytest

from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT
from llmtrain.training import gather as gathering
from llmtrain.training.gather import gather, memory_line, memory_of_an_export
from llmtrain.training.host_memory import available_memory
from llmtrain.training.language_model import LanguageModel


def system(root: Path, group: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 64000 kB\nMemAvailable: 32000 kB\n")
    (root / "proc/self/cgroup").write_text(group)
    for name, text in files.items():
        (root / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / name).write_text(text)
    return root


def test_the_narrowest_of_machine_and_control_groups(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    assert (available_memory() or 0) > 10_000_000
    assert available_memory(system(tmp_path / "none", "0::/\n", {})) == 32_768_000
    stat = "anon 5\nactive_file 7\ninactive_file 1000\n"
    files = {"job/a/memory.max": "max\n", "job/a/memory.current": "5\n"}
    files |= {"job/memory.max": "9000000\n", "job/memory.current": "4000000\n", "job/memory.stat": stat}
    assert available_memory(system(tmp_path / "two", "0::/job/a\n", files)) == 5_001_000
    files = {"memory/job/memory.limit_in_bytes": "8000000", "memory/job/memory.usage_in_bytes": "3000000"}
    files |= {"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "9"}
    assert available_memory(system(tmp_path / "one", "3:cpu:/\n4:memory:/job\n", files)) == 5_000_000


def test_a_copy_that_does_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MPTConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=300, max_seq_len=16)
    model = LanguageModel(MPT(config, device="cpu"), config)
    with monkeypatch.context() as patch:
        patch.setattr(gathering, "available_memory", lambda: gathering._RESERVE + 1000)
        found = gather(model, "float32", tmp_path / "checkpoints" / "ep0-ba1")
    assert found.problem is not None
    assert "precision: bfloat16" in found.problem
    assert found.snapshot is None
    assert not (tmp_path / "checkpoints").exists()
    assert gather(model, "float32", None, "no place").problem == "no place"
    whole = gather(model, "float32", tmp_path / "checkpoints" / "ep0-ba1")
    assert whole.problem is None
    whole.close()


def test_what_exports_will_take_is_said_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MPTConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=300, max_seq_len=16)
    model = LanguageModel(MPT(config, device="cpu"), config)
    sizes = [value.numel() for value in model.state_dict().values()]
    proof = 8 * 300 * 32  # the embedding twice, in float32
    assert memory_of_an_export(model, "float32") == 4 * sum(sizes) + proof
    assert memory_of_an_export(model, "bfloat16") == 2 * sum(sizes) + proof
    assert "WARNING" not in memory_line(1000)
    monkeypatch.setattr(gathering, "available_memory", lambda: 20_000_000_000)
    assert "27.00 GB of memory on rank 0 (20.0 GB are free now). WARNING: not enough" in memory_line(27_000_000_000)
