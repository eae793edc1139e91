"""What contenders of prep.py wrote, as ids, to see whether they are the same."""

import json
from pathlib import Path

import numpy as np
import zstandard
from numpy.typing import NDArray


def mds_tokens(folder: Path, seq_len: int) -> NDArray[np.uint32]:
    """The rows of an MDS dataset end to end, (n,), whatever the width of its ids."""
    shards = []
    for entry in json.loads((folder / "index.json").read_text())["shards"]:
        info = entry["zip_data"] or entry["raw_data"]
        data = (folder / info["basename"]).read_bytes()
        if entry["zip_data"]:
            data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
        width = np.dtype(entry["column_encodings"][0].split(":")[1])
        n = entry["samples"]
        ends = np.frombuffer(data, "<u4", n, 8)  # where each sample ends, and it ends with its values
        size = seq_len * width.itemsize
        shards += [np.frombuffer(data, width, seq_len, end - size).astype(np.uint32) for end in ends.tolist()]
    return np.concatenate([np.empty(0, np.uint32), *shards])


def datatrove_tokens(folder: Path, vocab_size: int) -> NDArray[np.uint32]:
    """The tokens of all its files in the order of the tasks, (n,)."""
    width = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    files = sorted((folder / "tokens").glob("*.ds"))
    return np.concatenate([np.empty(0, np.uint32), *(np.fromfile(file, width).astype(np.uint32) for file in files)])


def same_beginning(one: NDArray[np.uint32], other: NDArray[np.uint32], missing: int) -> bool:
    """Whether one is the beginning of the other, which is longer by less than `missing`."""
    n = min(len(one), len(other))
    return abs(len(one) - len(other)) < missing and bool(np.array_equal(one[:n], other[:n]))


def same_tokens(one: NDArray[np.uint32], other: NDArray[np.uint32], missing: int) -> bool:
    """Whether they hold the same tokens in any order, but for fewer than `missing` of each."""
    size = int(max(one.max(initial=0), other.max(initial=0))) + 1
    difference = np.bincount(one, minlength=size) - np.bincount(other, minlength=size)
    return int(difference.clip(0).sum()) < missing and int((-difference).clip(0).sum()) < missing
