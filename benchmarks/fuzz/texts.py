"""Annotations of the images in all formats that `prepare` accepts, and damage of files with lines and cells."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.fuzz.damage import Damage, damage_bytes

NAMES = ("a.png", "b.jpg", "c.jpg", "d.webp", "e.bmp", "f.tif", "g.avif", "h.gif", "i.tif")
LABELS = ("circle", "square")
SYNSETS = ("n01440764", "n01443537")
SPLITS = ("train", "train", "validation")
MANY_DIGITS = "9" * 5000
STRANGE_CELLS = (
    *("", " ", "-1", "0", "1", "2", "1.5", "1e400", MANY_DIGITS, "9" * 17, "٣", "²", "nan", "NaN", "null", "true"),
    *("\0", "a\0b", "\u2028", "\u202e", "\ufeff", "e\u0301", "é" * 200, "x" * 200_000, '"', "'", "\\", "a\rb", "#"),
    *("../../etc/passwd", "/etc/passwd", "/dev/zero", "..", ".", "~", "a.png", "A.PNG", "./a.png", "n01440764"),
    *("http://localhost:1/a.mp4", "concat:a.mp4", "=1+1", "<b>", "%s", "{}", "${a}", "train", "test", "source"),
)
SEPARATORS = (",", "\t", ";", " ", "|", "\n", "\r", "\r\n", "\0", "\u2028", "\x0b")


def annotation_files() -> Mapping[str, str]:
    """Return the annotations of the images, by the path of their file."""
    rows = [(name, f"a texture {n}", LABELS[n % 2], SPLITS[n % 3]) for n, name in enumerate(NAMES)]
    classes = list(enumerate(LABELS, start=1))
    lines = [dict(zip(("source", "caption", "label", "split"), row, strict=True)) for row in rows]
    videos = [{"video_id": name[0], "split": "train", "category": 1} for name in NAMES]
    sentences = [{"sen_id": n, "video_id": name[0], "caption": f"texture {n}"} for n, name in enumerate(NAMES)]
    images = [f"ILSVRC2012_val_{n:08d}" for n in range(1, 4)]
    return {
        "rows.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
        "rows.csv": "source,caption,label,split\n" + "".join(",".join(row) + "\n" for row in rows),
        "rows.tsv": "source\tcaption\tlabel\tsplit\n" + "".join("\t".join(row) + "\n" for row in rows),
        "videodatainfo.json": json.dumps({"info": {}, "videos": videos, "sentences": sentences}, indent=1),
        "trainlist01.txt": "".join(f"{LABELS[n % 2]}/{name} {n % 2 + 1}\n" for n, name in enumerate(NAMES[:6])),
        "testlist01.txt": "".join(f"{LABELS[n % 2]}/{name}\n" for n, name in enumerate(NAMES[6:])),
        "classInd.txt": "".join(f"{number} {name}\n" for number, name in classes),
        "synset_words.txt": "".join(f"{synset} a fish\n" for synset in SYNSETS),
        "map_clsloc.txt": "".join(f"{synset} {n} fish\n" for n, synset in enumerate(SYNSETS, start=1)),
        "val.txt": "".join(f"{image}.JPEG {n % 2}\n" for n, image in enumerate(images)),
        "truth.txt": "1\n2\n1\n",
        "LOC_val_solution.csv": "ImageId,PredictionString\n"
        + "".join(f"{image},{SYNSETS[n % 2]} 85 1 499 272\n" for n, image in enumerate(images)),
        "images.txt": "".join(f"../images/{name}\n" for name in NAMES),
    }


def damage_text(path: Path, siblings: Sequence[Path], numbers: random.Random) -> Damage:
    """Damage a text of lines with cells: a cell, a line, the separators, or the ends of its lines."""
    content = path.read_bytes()
    text = content.decode(errors="replace")
    lines = text.splitlines()
    if not lines:
        return damage_bytes(path, siblings, numbers)
    place = numbers.randrange(len(lines))
    kind = numbers.choice(
        ("cell", "cell", "cell", "whole line", "separator", "repeated", "removed", "reordered", "ends", "encoding")
    )
    if kind == "encoding":
        encoding = numbers.choice(("utf-16", "utf-32", "latin-1", "utf-8-sig"))
        path.write_bytes(f"# é\n{text}".encode(encoding, errors="replace"))
        return Damage(f"{path.name} in {encoding}", (path,))
    if kind == "cell":
        separator = next((mark for mark in ("\t", ",", "/", " ") if mark in lines[place]), " ")
        cells = lines[place].split(separator)
        cell = numbers.choice(STRANGE_CELLS)
        cells[numbers.randrange(len(cells))] = cell
        lines[place], kind = separator.join(cells), f"cell {cell!r:.30}"
    elif kind == "whole line":
        lines[place] = numbers.choice(STRANGE_CELLS)
    elif kind == "separator":
        old, new = numbers.choice((",", "\t", " ", "/")), numbers.choice(SEPARATORS)
        lines = [line.replace(old, new) for line in lines]
    elif kind == "repeated":
        lines.insert(numbers.randrange(len(lines)), lines[place])
    elif kind == "removed":
        del lines[place]
    elif kind == "reordered":
        numbers.shuffle(lines)
    end = numbers.choice(SEPARATORS) if kind == "ends" else "\n"
    path.write_bytes("".join(line + end for line in lines).encode(errors="surrogatepass"))
    return Damage(f"{kind}: lines of {path.name}", (path,))
