"""Damages shards, for tests."""

from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.shards import ShardReader


def damage(manifest: Manifest, shard: int, number: int) -> str:
    """Flip one bit in the first latent frame of a sample; return the name of the sample in messages."""
    reader = ShardReader(manifest.directory, manifest.shards[shard])
    path = manifest.directory / manifest.shards[shard].path
    content = bytearray(path.read_bytes())
    content[int(reader.index[number, 0]) + 130] ^= 0x10
    path.write_bytes(content)
    return f"sample {number} of {path}"
