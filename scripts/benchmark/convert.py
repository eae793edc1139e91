"""Time and peak memory of a conversion: a model of random weights is built on disk, converted, proven, and deleted.

    python scripts/benchmark/convert.py --d-model 4096 --layers 32 --vocab 50432 --dtype bfloat16     # MPT-7B's shape

Prints one line of JSON. Needs twice the model's size on the disk; neither it nor the conversion holds the model.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from llmtrain.checkpoint import compare, manifest
from llmtrain.checkpoint.cast import DTYPES
from llmtrain.checkpoint.export import export
from llmtrain.checkpoint.hugging_face import write_hf_folder
from llmtrain.checkpoint.import_command import import_weights
from llmtrain.checkpoint.sharded_writer import write_sharded
from llmtrain.checkpoint.torch_file_writer import write_torch_file
from llmtrain.model.config import MPTConfig
from llmtrain.testing.peak_memory import peak_memory
from llmtrain.testing.random_weights import RandomWeights

KINDS = ("sharded", "full", "safetensors", "bin")


def build(place: Path, kind: str, block: dict[str, Any], dtype: str, shard: str) -> RandomWeights:
    """Write random weights as a checkpoint or a Hugging Face folder; returns them."""
    config = MPTConfig.model_validate(block)
    weights = RandomWeights(config, DTYPES[dtype])
    place.mkdir()
    if kind in ("safetensors", "bin"):
        write_hf_folder(place, config, weights, dtype=dtype, tokenizer=None, max_shard_size=shard, weights_format=kind)
        return weights
    if kind == "sharded":
        write_sharded(place, weights)
    else:
        write_torch_file(
            place / "full.pt",
            weights,
            list(weights),
            lambda tensors: {"state": {"model": {f"model.{name}": value for name, value in tensors.items()}}},
        )
    manifest.write(
        place,
        kind=kind,
        step=1,
        tokens=1,
        files={file.name: manifest.file_entry(file) for file in place.iterdir()},
        recipe={"model": block},
        tokenizer_fingerprint=None,
        weights_only=True,
    )
    return weights


def convert(source: Path, target: Path, kind: str, dtype: str, shard: str) -> None:
    """Import or export, by what the target is."""
    if kind in ("sharded", "full"):
        import_weights(source, target, to=kind)
    else:
        export(source, target, dtype=dtype, weights_format=kind, max_shard_size=shard)


def main() -> None:
    """Build, convert, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", choices=KINDS, default="sharded")
    parser.add_argument("--target", choices=KINDS, default="safetensors")
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--shard", default="200MB", help="max_shard_size of source and target")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder when left out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    block: dict[str, Any] = {
        "name": "mpt_causal_lm",
        "d_model": args.d_model,
        "n_heads": args.heads,
        "n_layers": args.layers,
        "vocab_size": args.vocab,
        "max_seq_len": 2048,
        "no_bias": True,
        "attn_config": {"alibi": True},
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        # What is imported when it is first used is no part of a conversion's memory.
        build(folder / "tiny", args.source, {**block, "d_model": 32 * args.heads, "n_layers": 1}, args.dtype, "200MB")
        whole, compare.WHOLE = compare.WHOLE, 0
        convert(folder / "tiny", folder / "tiny-out", args.target, args.dtype, "200MB")
        compare.WHOLE = whole
        started = time.monotonic()
        with peak_memory() as built:
            weights = build(folder / "source", args.source, block, args.dtype, args.shard)
        middle = time.monotonic()
        with peak_memory() as converted:
            convert(folder / "source", folder / "target", args.target, args.dtype, args.shard)
        sizes = [file.stat().st_size for file in (folder / "target").iterdir()]
        found = {
            "source": args.source,
            "target": args.target,
            "bytes": weights.total_size(),
            "largest_tensor": max(weights.size(name) for name in weights),
            "largest_file": max(sizes),
            "files": len(sizes),
            "build_seconds": round(middle - started, 1),
            "build_peak": built.bytes,
            "seconds": round(time.monotonic() - middle, 1),
            "peak": converted.bytes,
        }
        print(json.dumps(found))


if __name__ == "__main__":
    main()
