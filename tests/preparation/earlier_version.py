"""Records of a preparation as earlier versions wrote them."""

import json
from pathlib import Path


def remove_hashes(records: Path) -> None:
    """Remove the hashes from all records in a folder."""
    for path in (records / "options.json", *records.glob("part-?????.json")):
        if path.exists():
            content = json.loads(path.read_text())
            del content["content_sha256"]
            content.pop("part", None)
            content.pop("options" if path.name != "options.json" else "", None)
            path.write_text(json.dumps(content))
    for path in records.glob("*.shards.json"):
        path.unlink()
    for path in records.glob("*.sources.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
