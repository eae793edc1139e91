"""Shards that unfold to more than the index says."""

import brotli
import pytest
import snappy

from llmtrain.data.mds_files import Damage, unpack


@pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_000])
def test_what_the_index_says_is_unpacked(size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    assert unpack(brotli.compress(data, quality=1), "br", size) == data
    assert unpack(snappy.compress(data), "snappy", size) == data


def test_a_bomb_is_not_unfolded() -> None:
    """100 MB of zeros are 100 bytes of brotli's."""
    packed = brotli.compress(bytes(100_000_000), quality=9)
    assert len(packed) < 1000
    assert 1000 < len(unpack(packed, "br", 1000)) < 1_000_000
    with pytest.raises(Damage, match="it says that it makes 100,000,000 bytes, and no more than 1,000 are expected"):
        unpack(snappy.compress(bytes(100_000_000)), "snappy", 1000)


def test_a_bomb_is_not_unfolded_by_an_old_brotli_either(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = brotli.Decompressor

    class Old:
        """Before 1.2."""

        def __init__(self) -> None:
            self.decoder = decoder()

        def process(self, data: bytes) -> bytes:
            return bytes(self.decoder.process(data))

        def is_finished(self) -> bool:
            return bool(self.decoder.is_finished())

    monkeypatch.setattr("brotli.Decompressor", Old)
    data = bytes(range(256)) * 1000
    packed = brotli.compress(data)
    assert unpack(packed, "br", len(data)) == data
    with pytest.raises(Damage, match="cut short"):
        unpack(packed[:-2], "br", len(data))


@pytest.mark.parametrize("compression", ["br", "snappy"])
def test_a_shard_that_is_cut_short_is_damaged(compression: str) -> None:
    data = bytes(range(256)) * 100
    packed = brotli.compress(data) if compression == "br" else snappy.compress(data)
    for part in (b"", packed[:-2]):
        with pytest.raises(Damage, match="does not decompress"):
            unpack(part, compression, len(data))
