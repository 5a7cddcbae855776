"""Values that no option can use: each type of option accepts or refuses them with one clear sentence."""

import dataclasses
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from jsonargparse import Namespace

from gpdit_lightning.cli import VERBS, record_of, run
from gpdit_lightning.cli.parsing import option_names, parse, parser_of
from gpdit_lightning.cli.recipe_cli import parse_recipe
from gpdit_lightning.cli.trainer_settings import LOCAL_PATHS
from gpdit_lightning.cli.value_checks import LIMITS, check_folder, check_limits, check_values
from gpdit_lightning.errors import InputError
from gpdit_lightning.names import check_local
from gpdit_lightning.training.callbacks.previews import Preview
from gpdit_lightning.training.callbacks.scores import Scores

VALUES = ("-1", "nan", str(10**30), "abc", "{}", "null")
# Words of jsonargparse and Python that mean nothing to a user.
JARGON = re.compile(
    r"<class|object at 0x|Expected |jsonargparse|NoneType|typing\.|collections\.abc|Namespace\(|Subtypes"
)


def test_options_of_every_type_refuse_hostile_values_in_one_clear_sentence() -> None:
    parsed = set[str]()
    for verb in VERBS:
        record = record_of(verb)
        hints = get_type_hints(record)
        names = [name for name in option_names(record) if str(hints[name]) not in parsed]
        parser = parser_of(verb, "Does something.", record) if names else None
        for name in names:
            parsed.add(str(hints[name]))
            for value in VALUES:
                try:
                    parser.parse_args([f"--{name}={value}"])
                except InputError as error:
                    sentence = str(error)
                else:
                    continue
                if "missing: see --help" in sentence:  # a required option; the value was accepted
                    continue
                shown = f"--{name}={value}: {sentence}"
                assert name in sentence, shown
                assert not JARGON.search(sentence), shown
                assert "\n" not in sentence, shown
                assert len(sentence) < 500, shown
    assert len(parsed) > 20


@pytest.mark.parametrize(
    ("verb", "required", "name", "values"),
    [
        ("app", ["--checkpoint=m"], "steps", ("0", str(2**62))),
        ("app", ["--checkpoint=m"], "max_seconds", ("-1", "0", "1e30")),
        ("app", ["--checkpoint=m"], "label_guidance", ("-1", "1e30")),
        ("app", ["--checkpoint=m"], "port", ("-1", "65536")),
        ("sample", ["--checkpoint=m"], "frames", (str(2**62),)),
        ("sample", ["--checkpoint=m"], "samples", (str(2**62),)),
        ("evaluate", ["--checkpoint=m", "--out=o"], "samples", (str(2**62),)),
        ("features", ["--checkpoint=m", "--videos=v", "--out=o"], "temporal_tokens", (str(2**62),)),
        ("features", ["--checkpoint=m", "--videos=v", "--out=o"], "workers", (str(2**62),)),
        ("probe", ["--checkpoint=m", "--videos=v", "--out=o"], "workers", (str(2**62),)),
        ("prepare-pairs", ["--sources=s", "--out=o"], "sequences", (str(2**62),)),
        ("prepare", ["--videos=v", "--out=o"], "part_size", (str(2**62),)),
        ("ablate", ["--config=r.yaml", "--arms={a: {}}", "--out=o"], "seeds", ("[-1]", "[4294967296]", "[1, 1]")),
    ],
)
def test_values_outside_the_range_of_an_option_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    required: list[str],
    name: str,
    values: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("run_dir: r")
    for value in values:
        with pytest.raises(InputError, match=rf"^--{name} (is|are) .*: give .*(from|to|at most) \d"):
            parse(verb, "Does something.", record_of(verb), [*required, f"--{name}={value}"])


@pytest.mark.parametrize(("verb", "name"), [("plan", "out"), ("inspect", "folder"), ("probe", "out")])
def test_empty_paths_are_refused(verb: str, name: str, tmp_path: Path) -> None:
    """They would be the working directory, such as from a variable of the shell that is not set."""
    for words in ([f"--{name}="], [f"--{name}", ""]):
        with pytest.raises(InputError, match=rf"^--{name} is empty: give a value, or leave the option out\.$"):
            parse(verb, "Does something.", record_of(verb), words)
    (tmp_path / "options.yaml").write_text(f"{name}: ''")
    with pytest.raises(InputError, match=rf"{name} is empty[:;] "):
        parse(verb, "Does something.", record_of(verb), [f"--config={tmp_path}/options.yaml"])


@pytest.mark.parametrize(
    ("verb", "words", "sentence"),
    [
        ("transform", ["--checkpoint=m", "--examples=e", "--out=o", "--source=[]"], "--source is an empty list"),
        ("plan", ["--data_dir=[]"], "--data_dir is an empty list"),
        ("plan", ["--data_dir=a", "--out=\udcff.yaml"], "--out is .*, which is not UTF-8"),
        ("plan", ["--data_dir", "a", "\udcff"], "--data_dir is .*, which is not UTF-8"),
        ("plan", ["--data_dir=a", "--host_memory=1e308"], "--host_memory is 1e.308: give a number from 1e-06 to 1e.09"),
        ("plan", ["--data_dir=a", "--run_dir=\udcff"], "--run_dir is .*, which is not UTF-8"),
    ],
)
def test_empty_lists_and_names_that_a_recipe_cannot_record_are_refused(
    verb: str, words: list[str], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        parse(verb, "Does something.", record_of(verb), words)


# Options of type str that are paths.
PATHS = {
    *("videos", "images", "image_tars", "annotations", "context", "examples", "source"),
    *("checkpoint", "reference", "codec_source", "config"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_addresses_are_refused_where_a_path_is_needed(verb: str) -> None:
    """`Path` would make a folder `https:` of the address of an output, and the message would show one slash."""
    record = record_of(verb)
    hints = get_type_hints(record)
    required = {
        field.name: {"a": {"b": 1}} if field.name == "arms" else "x" if hints[field.name] in (str, Path) else ["x"]
        for field in dataclasses.fields(record)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    paths = [name for name, hint in hints.items() if "Path" in str(hint) or name in PATHS]
    assert paths
    for name in paths:
        for address in ("https://host/file", Path("https://host/file"), ["x", "s3://bucket/x"]):
            sentence = rf"^--{name} is (https://host/file|s3://bucket/x), an address: give a path on this machine"
            with pytest.raises(InputError, match=sentence):
                record(**required | {name: address})


def test_addresses_in_recipes_are_refused_where_a_path_is_needed(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("base: https://host/x.yaml")
    (tmp_path / "chain.yaml").write_text("stages: [https://host/x.yaml]")
    base, chain, tiny = (
        f"--config={tmp_path}/base.yaml",
        f"--config={tmp_path}/chain.yaml",
        "--config=gpdit:stage2_mixed",
    )
    for words, named in (
        (["fit", base], f"a base of {tmp_path}/base.yaml is https://host/x.yaml"),
        (["chain", chain], f"a stage of {tmp_path}/chain.yaml is https://host/x.yaml"),
        *((["fit", tiny, f"--{name}=https://host/x"], f"{name} is https://host/x") for name in LOCAL_PATHS),
    ):
        with pytest.raises(InputError, match=f"^{named}, an address: give a path on this machine"):
            run(words[0], words[1:])
    parse_recipe("fit", [tiny, "--latents=s3://bucket"])


def test_a_path_through_a_folder_with_a_colon_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("Film:").mkdir()
    check_local("--out", Path("Film:/a.mp4"))
    check_local("--out", "C:/a.mp4")


@pytest.mark.parametrize("value", ["", " ", "null", "???", "[]", "{a: 1}", "x" * 5000, 5, None])
def test_what_cannot_be_a_folder_is_refused(value: object) -> None:
    with pytest.raises(InputError, match=r"^run_dir is .*: give the path of a folder\.$") as raised:
        check_folder("run_dir", value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("value", [float("nan"), 2**63, "a\0b", Path("a\0b")])
def test_unusable_values_are_found_at_any_depth(value: object) -> None:
    with pytest.raises(InputError, match=r"^a\.b\[1\] is .*: (give a|remove the)"):
        check_values("a", {"b": [0, value]})


@pytest.mark.parametrize("name", LIMITS)
def test_values_of_recipes_above_their_limit_are_refused(name: str) -> None:
    check_limits(Namespace({name: LIMITS[name]}))
    for value in (LIMITS[name] + 1, 1e30):
        with pytest.raises(InputError, match=rf"^{name} is .*: give at most {LIMITS[name]}\.$"):
            check_limits(Namespace({name: value}))


@pytest.mark.parametrize(("callback", "option"), [(Preview, "preview.sampler"), (Scores, "scores.sampler")])
def test_samplers_without_a_known_name_are_refused_at_once(callback: type[Any], option: str) -> None:
    for name in ("rotaton", "", "a/b"):
        with pytest.raises(InputError, match=rf"^{option} '{name}' is not known.*: choose one of rotation, "):
            callback(sampler=name)
    callback(sampler="not_imported_yet.Sampler")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("1.5", r"video_network is 1\.5; it must be names with values, .*"),
        ("os.system", r"video_network is os\.system; it must be names with values, .*"),
        ("{kind: 3}", "video_network: kind is 3; it must be a string."),
        ("{a: 1}", r"video_network: Option 'a' is not accepted; did you mean 'arguments'\?"),
    ],
)
def test_the_option_is_named_if_its_value_is_no_record(value: str, sentence: str) -> None:
    arguments = ["--checkpoint=a", "--videos=b", "--out=c", f"--video_network={value}"]
    with pytest.raises(InputError) as error:
        parse("evaluate", "Scores.", record_of("evaluate"), arguments)
    assert re.fullmatch(sentence, str(error.value))


@pytest.mark.parametrize("place", ["recipe", "command line"])
def test_groups_in_the_files_of_groups_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    from gpdit_lightning.cli.recipe_cli import recipe_parser

    monkeypatch.chdir(tmp_path)
    parser = recipe_parser()
    Path("recipe.yaml").write_text(
        yaml.safe_dump({"model": "MixedStage"} | ({"data": "data.yaml"} if place == "recipe" else {}))
    )
    words = ["--config=recipe.yaml", *(["--data=data.yaml"] if place == "command line" else [])]
    for content, sentence in (
        ("cache: [1]", "data.yaml: data.cache is [1]; it must be names with values"),
        ("images: images.yaml", "images.yaml has no fields"),
        ("videos: {}\ncache: data.yaml", "data.yaml: data.cache is 'data.yaml', which contains this file"),
    ):
        Path("data.yaml").write_text(content)
        Path("images.yaml").write_text("- 1")
        with pytest.raises(InputError, match=re.escape(sentence)):
            parser.parse_args(words)
