"""Names of files as text."""

import io

import pytest
from matplotlib.figure import Figure

from gpdit_lightning.names import ESCAPING, as_text, figure_text, from_text, nearest_names, printable


@pytest.mark.parametrize(
    ("name", "text", "shown"),
    [
        ("日本 é.mp4", "日本 é.mp4", "日本 é.mp4"),
        ("caf\udce9.mp4", r"caf\xe9.mp4", r"caf\xe9.mp4"),
        ("a\u2028b\nc\x1b[31m\x85.mp4", "a\u2028b\nc\x1b[31m\x85.mp4", r"a\u2028b\nc\x1b[31m\x85.mp4"),
        ("back\\slash", "back\\slash", "back\\slash"),
        ("\ud800", r"\ud800", r"\ud800"),
    ],
)
def test_names_become_valid_text_and_one_printed_line(name: str, text: str, shown: str) -> None:
    assert as_text(name) == text
    assert as_text(name).encode()
    assert printable(name) == shown


def test_the_bytes_of_a_name_are_restored_from_its_text() -> None:
    name = "caf\udce9 \udcff 日.mp4"
    assert from_text(as_text(name)) == name
    assert "日 caf\udce9".encode("latin-1", ESCAPING) == rb"\u65e5 caf\xe9"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (r"$x_$ and \$y^$", r"$x_$ and \$y^$"),
        ("$$", "$$"),
        ("$" + "{" * 50 + "$", "$" + "{" * 50 + "$"),
        ("_run", " _run"),
        ("r\udcff\n", r"r\xff\n"),
    ],
)
def test_figures_show_any_name(name: str, shown: str) -> None:
    figure = Figure()
    figure.subplots().plot([0, 1], label=figure_text(name))
    (label,) = figure.legend().texts
    assert label._preprocess_math(label.get_text()) == (shown, False)
    figure.savefig(io.BytesIO())


def test_the_nearest_of_many_names_are_shown() -> None:
    assert nearest_names("x", ["run", "jump"]) == "run, jump"
    many = [f"class {number}" for number in range(998)] + ["tiger shark", "tiger cat"]
    text = nearest_names("tiger", many)
    assert text.startswith(("tiger shark, tiger cat, ...", "tiger cat, tiger shark, ..."))
    assert "(1,000 classes" in text
    assert nearest_names("zzzz", many).count("class ") == 10
