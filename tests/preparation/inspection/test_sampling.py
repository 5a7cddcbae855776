"""Selection of samples."""

from gpdit_lightning.data.shard_entry import ShardEntry
from gpdit_lightning.preparation.inspection.sampling import balanced, evenly_spaced


def shard(count: int, kind: str = "video") -> ShardEntry:
    return ShardEntry(f"{kind}{count}.tar", "", "train", kind, (1, 1, 1, 1), count, 1, "", "")


def test_samples_are_evenly_spaced() -> None:
    shards = [shard(count) for count in (5, 1, 14)]
    everything = [(entry, number) for entry in shards for number in range(entry.count)]
    assert evenly_spaced(shards, 20) == evenly_spaced(shards, 99) == everything
    assert evenly_spaced(shards, 4) == [everything[i] for i in (2, 7, 12, 17)]
    assert evenly_spaced([], 4) == []


def test_groups_with_enough_samples_have_equal_shares() -> None:
    shards = [shard(2, "image"), shard(30, "video"), shard(9, "sequence")]
    picked = balanced(shards, 12)
    assert [sum(entry.kind == kind for entry, _ in picked) for kind in ("image", "video", "sequence")] == [2, 5, 5]
    assert [number for entry, number in picked if entry.kind == "video"] == [3, 9, 15, 21, 27]
    assert len(balanced(shards, 2)) == 2
    assert len(balanced(shards, 99)) == 41
