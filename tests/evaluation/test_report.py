"""The report of an evaluation: JSON, tables, comparison with the paper, and figure."""

import json
import os
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from PIL import Image

from gpdit_lightning.diffusion import Guidance, NoiseSchedule
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.network_files import NetworkRecord
from gpdit_lightning.evaluation.report import Protocol, Report, Score, library_versions, other_setting
from gpdit_lightning.evaluation.report_text import paper_comparison, plot_self_checks, to_markdown, write_report
from gpdit_lightning.evaluation.self_checks import check_distances
from gpdit_lightning.options.evaluate import EvaluateOptions
from gpdit_lightning.options.shared import names_of
from gpdit_lightning.schema import CONTENT_HASH

RISING = ((8.0, 1.0), (16.0, 20.5))


@pytest.fixture
def report() -> Report:
    protocol = Protocol(
        data="UCF-101",
        choice="drawn by a hash of their names with seed 0",
        split_sha256="ab12",
        videos=9000,
        context_frames=5,
        generated_frames=12,
        fvd_frames="all",
        size=(192, 320),
        stride=3,
        resize="short side bicubic, middle cut out",
        sampler="rotation",
        steps=25,
        guidance=Guidance(context=2.0, most_level=0.8),
        schedule=NoiseSchedule(shift=2.0),
        seeds=(0, 1),
        window=4,
        precision="bf16",
        checkpoint="step-400000",
        checkpoint_sha256="cd34",
        step=400_000,
        weights="ema",
        codec="wan",
        codec_sha256="ef56",
        networks={"video": NetworkRecord("I3D", "i3d.safetensors", "0789", "short side to 224")},
        versions=library_versions(),
        hardware="one H200",
    )
    return Report(
        protocol,
        scores={"fvd": Score.of([210.0, 214.0]), "is": Score.of([61.234, 61.254]), "ssim": Score.of([0.81, 0.81])},
        references={"the codec alone": {"fvd": Score.of([20.0])}},
        self_checks={"fvd": check_distances(0.0, 30.0, RISING, ((1.0, 2.0), (2.0, 1.0)), videos=20)},
        warnings=("FVD is of few samples.",),
        date="2025-06-01",
    )


def test_a_report_survives_the_round_trip_through_json(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "results")
    assert Report.load(tmp_path / "results" / "results.json") == report
    content = json.loads(report.to_json())
    assert content["scores"]["fvd"] == {"mean": 212.0, "deviation": pytest.approx(8**0.5), "per_seed": [210.0, 214.0]}
    assert content["protocol"]["guidance"]["context"] == 2.0
    single_seed = replace(report, scores={"fvd": Score.of([3.0])})
    assert Report.from_json(single_seed.to_json()).scores["fvd"].deviation is None


def test_numbers_that_json_lacks_are_refused(report: Report) -> None:
    with pytest.raises(ValueError, match="JSON"):
        replace(report, scores={"fvd": Score.of([float("nan")])}).to_json()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (("protocol", "colour"), "red", r"results.json, protocol has the unknown field 'colour': give"),
        (("protocol", "steps"), None, r"results.json, protocol lacks the field 'steps': give"),
        (("protocol", "videos"), "many", r"results.json, protocol, videos is 'many'"),
        (("protocol", "size"), [192, 320, 3], r"protocol, size is \[192, 320, 3\]"),
        (("protocol", "weights"), "best", "protocol, weights is 'best'"),
        (("protocol", "seeds"), [0, True], "protocol, seeds is True"),
        (("scores", "fvd"), 212.0, "scores, fvd is 212.0"),
        (("self_checks", "fvd"), {"itself": 0.0}, "self_checks, fvd lacks the field 'blur'"),
    ],
)
def test_a_file_with_a_wrong_field_is_refused(
    report: Report, tmp_path: Path, field: tuple, value: object, message: str
) -> None:
    content = json.loads(report.to_json())
    del content[CONTENT_HASH]  # as of an earlier version
    if value is None:
        del content[field[0]][field[1]]
    else:
        content[field[0]][field[1]] = value
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        Report.load(path)


def test_an_edited_report_is_refused(report: Report, tmp_path: Path) -> None:
    """Also where a table does not show the value, such as the warnings of an emptied list."""
    path = tmp_path / "results.json"
    for edited in ({"warnings": ["a", "b"]}, {"self_checks": {}}, {"date": "2025-06-02"}):
        path.write_text(json.dumps(json.loads(report.to_json()) | edited))
        with pytest.raises(InputError, match=r"results\.json records the hash .* damaged or edited"):
            Report.load(path)


def test_a_file_that_is_not_a_report_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(InputError, match=r"results.json cannot be read"):
        Report.load(path)
    for text, message in (("{", "results.json is not readable JSON"), ("[]", r"results.json is \[\]")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            Report.load(path)


def test_a_protocol_that_contradicts_itself_is_refused_with_the_file(report: Report, tmp_path: Path) -> None:
    content = json.loads(report.to_json())
    del content[CONTENT_HASH]
    content["protocol"]["samples"] = 7
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"results\.json, protocol has values .* \(samples is 7 and manifold None"):
        Report.load(tmp_path / "results.json")


def test_the_tables_contain_scores_and_protocol(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0].startswith("|  | FVD ↓ | IS ↑ | SSIM ↑ | data | videos | frames |")
    assert rows[2].startswith(
        "| `step-400000` | 212.0 ± 2.8 | 61.24 ± 0.01 | 0.810 ± 0.000 | UCF-101 | 9,000 | 12 from 5"
    )
    assert rows[3].startswith("| the codec alone | 20.00 | - | - |")
    assert {row.count("|") for row in rows[:4]} == {rows[0].count("|")}
    for message in (
        "# UCF-101: 12 frames from 5",
        "**Warning:** FVD is of few samples.",
        "drawn by a hash of their names with seed 0; sha256 of their names `ab12`",
        "stride 3, 192x320 pixels, short side bicubic, middle cut out. FVD, precision and recall are computed from con",
        "rotation, 25 steps, cosine schedule with shift 2; guidance 2 over the context, 1 over the label at noise",
        "Seeds: 0, 1;",
        "`step-400000` (ema, step 400,000), sha256 `cd34`; codec wan, sha256 `ef56`",
        "I3D (`i3d.safetensors`, sha256 `0789`); short side to 224",
        f"torch {library_versions()['torch']}",
        "Hardware: one H200; date: 2025-06-01.",
        "| ground truth against | videos distorted | itself | the other half | noise 8 | noise 16 | blur 1 | blur 2 |",
        "| FVD | 20 | 0 | 30 | 1 | 20.5 | 2 | 1 | the distance at blur 2 is 1, not larger than 2 at blur 1 |",
    ):
        assert message in text


def with_scores(report: Report, networks: dict[str, NetworkRecord], *names: str) -> Report:
    """Return the report of an evaluation with other networks, whose scores are 1."""
    return replace(
        report,
        protocol=replace(report.protocol, networks=networks),
        scores={name: Score.of([1.0]) for name in names},
        references={},
        self_checks={},
    )


def test_missing_networks_are_named_first(report: Report) -> None:
    network = NetworkRecord("net", "net.pt", "0789", "none")
    text = to_markdown(with_scores(report, {}, "psnr", "ssim"))
    lines = text.splitlines()
    assert re.match(
        r"\*\*Missing:\*\* FVD, precision and recall need --video_network\.path: give I3D's weights as "
        r"\.safetensors, or i3d_torchscript\.pt from https://\S+ \(sha256 [0-9a-f]{64}\)\.$",
        lines[2],
    )
    assert re.match(
        r"\*\*Missing:\*\* FID and IS need --image_network\.path: give inception-2015-12-05\.pt from "
        r"https://\S+ \(sha256 [0-9a-f]{64}\)\.$",
        lines[4],
    )
    assert lines[6].startswith("|  | PSNR")
    assert "MagicVideo" not in text
    assert "Scores are computed from generated frames." in text

    text = to_markdown(with_scores(report, {"image": network}, "fid"))
    assert text.count("**Missing:**") == 2
    assert "FVD of" not in text
    assert "Table 2, zero-shot on UCF-101" in text
    assert "Table 3" not in text  # which has FVD only

    assert "Missing" not in to_markdown(with_scores(report, {"image": network, "video": network}, "fid", "is", "fvd"))


def test_checkpoint_of_any_name(report: Report, tmp_path: Path) -> None:
    protocol = replace(report.protocol, checkpoint=os.fsdecode(b"caf\xe9|a\nb"))
    write_report(replace(report, protocol=protocol), tmp_path)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| `caf\\xe9\\|a\\nb` | 212.0" in text
    assert Report.load(tmp_path / "results.json").protocol.checkpoint == protocol.checkpoint


def cells(text: str, method: str) -> list[list[str]]:
    """Return the cells of all rows of a method."""
    return [row[2:-2].split(" | ") for row in text.splitlines() if row.startswith(f"| {method} |")]


def test_the_comparison_contains_the_scores_of_the_paper_and_of_the_report(report: Report) -> None:
    text = paper_comparison(report)
    assert "MSR-VTT" not in text
    protocol = "10,000 videos, 12 frames from 5, guidance"
    assert cells(text, "GPDiT-H") == [
        ["GPDiT-H", "192M Img + 6.4M Vid", "2.0B", "14.8", "243", "66.5", f"{protocol} 1.2"]
    ]
    assert cells(text, "GPDiT-B-OF2") == [["GPDiT-B-OF2", "80M", "Frame-AR", "214", f"{protocol} 2.0"]]
    assert cells(text, "PixelDance") == [["PixelDance", "10M", "1.5B", "49.4", "243", "42.1", "12 frames from 5"]]
    assert cells(text, "FAR") == [["FAR", "130M", "Frame-AR", "194", "not stated"]]
    protocol_of_report = "9,000 videos, 12 frames from 5, guidance 2"
    assert cells(text, "`step-400000`") == [
        ["`step-400000`", "-", "-", "-", "212.0 ± 2.8", "61.24 ± 0.01", protocol_of_report],
        ["`step-400000`", "-", "-", "212.0 ± 2.8", protocol_of_report],
    ]
    assert "9,000 videos, not 10,000; guidance 2, not 1.2. The paper does not state" in text
    assert "9,000 videos, not 10,000. The paper does not state" in text


def test_another_data_set_is_compared_with_all_tables(report: Report) -> None:
    text = paper_comparison(replace(report, protocol=replace(report.protocol, data="kitchens", generated_frames=16)))
    assert text.count("### Table") == 3
    assert [row[2:4] for row in cells(text, "MagicVideo")] == [["-", "36.5"], ["-", "145.0"]]
    assert [row[3:5] for row in cells(text, "GPDiT-H-LONG")] == [["7.4", "64"], ["7.9", "218"]]
    assert "data kitchens, not MSR-VTT; 9,000 videos, not 7,000; 16 frames from 5, not 12 from 5; guidance" in text


def test_other_settings_are_named_by_options_of_evaluate(report: Report) -> None:
    """Each field of the protocol; a setting with short values precedes a hash or a sentence."""
    names = set(asdict(report.protocol)) - {"guidance", "networks"}
    names |= {f"guidance.{field.name}" for field in fields(Guidance)}
    names |= {f"networks.{role}.sha256" for role in ("video", "image", "classifier")}
    known = {f"--{name}" for name in names_of(EvaluateOptions)}
    for name in names:
        options = re.findall(r"--\w+", other_setting([(name, "a" * 64, "b" * 64)]))
        assert name.startswith("versions") or (options and known.issuperset(options)), name
    different = [("split_sha256", "a" * 64, "b" * 64), ("seeds", [0], [1])]
    assert other_setting(different) == "--seeds ([0], not [1])"


def test_an_evaluation_with_the_protocol_of_the_paper_has_no_differences(report: Report) -> None:
    protocol = replace(report.protocol, data="msrvtt", videos=7000, guidance=Guidance(1.2))
    assert "Differences from the paper: none in what the paper states." in paper_comparison(
        replace(report, protocol=protocol)
    )


def test_self_checks_are_plotted(report: Report, tmp_path: Path) -> None:
    plot_self_checks(report, tmp_path / "self_checks.png")
    with Image.open(tmp_path / "self_checks.png") as image:
        assert image.format == "PNG"
        assert len(image.convert("L").resize((50, 25)).getcolors()) > 5
