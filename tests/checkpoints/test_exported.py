"""Export of models to folders and the hub, and loading of valid, damaged and malicious folders."""

import copy
import hashlib
import json
import math
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.checkpoints import exported
from gpdit_lightning.checkpoints.card import CardDetails
from gpdit_lightning.checkpoints.exported import read_exported, write_checksums, write_exported
from gpdit_lightning.checkpoints.facts import Origin, TrainingFacts
from gpdit_lightning.checkpoints.weights import Weights, shapes_of
from gpdit_lightning.errors import InputError

Randomise = Callable[[GPDiT], GPDiT]

FACTS: dict[str, Any] = {
    "weights": "ema",
    "step": 1200,
    "stage": "MixedStage",
    "origin": {"path": "runs/before", "step": 7, "sha256": "0" * 64},
    "schedule": {"name": "cosine", "shift": 2.0},
    "codec": {
        "name": "pca",
        "source": None,
        "latent_channels": 4,
        "spatial_factor": 8,
        "temporal_factor": 4,
        "mean": [0.5, -0.25, 2, 0.0],
        "std": [2.0, 0.5, 4.0, 1.0],
        "fingerprint": "0123456789abcdef",
    },
    "geometry": {"stride": 3, "sizes": [[64, 64]], "frames": 3},
    "classes": ["run", "jump"],
    "data": {"data.seed": 0, "data.labels": ["run", "jump"], "data.videos.manifests": ["0123456789abcdef"]},
    "validation": {"step": 1100, "quarters": {"images": [0.5, 0.25, 0.25, 1.0], "videos": [0.5, 0.25, None, 1.0]}},
    "scores": {
        "step": 1000,
        "source": "videos",
        "clips": 64,
        "context_frames": 5,
        "generated_frames": 8,
        "sampler": "adams",
        "sampler_steps": 8,
        "networks": {"fvd": "I3D"},
        "values": {"fvd": 212.04, "fvd_repeated": 310.0, "rollout_error_ratio": 0.52},
    },
    "run": {
        "optimizer": {"learning_rate": 0.001, "betas": [0.9, 0.99]},
        "precision": "bf16-mixed",
        "hardware": "8 x Accelerator",
        "samples": {"videos": {"train": 5000, "validation": 40}},
    },
    "lightning_version": "2.6.6",
}


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.fixture
def model(tiny_config: GPDiTConfig, randomise: Randomise) -> GPDiT:
    return randomise(GPDiT(tiny_config.replaced(classes=2))).eval()


@pytest.fixture
def folder(model: GPDiT, tmp_path: Path) -> Path:
    """The exported folder of a model with all facts of its training."""
    model.facts = TrainingFacts.from_dict(FACTS, "config.json")
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def velocity(model: GPDiT) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    noisy, clean = torch.randn(2, 2, 3, 4, 8, 8, generator=generator)
    with torch.no_grad():
        return model(noisy, torch.linspace(0, math.pi / 2, 6).view(2, 3), clean)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))
    write_checksums(folder)  # so that the content is checked, and not only its hash


def test_a_saved_model_is_loaded_unchanged(model: GPDiT, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json", "README.md", "SHA256SUMS"}
    again = GPDiT.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.facts == TrainingFacts()
    assert not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())
    for (name, value), (same_name, saved) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == same_name
        assert torch.equal(value, saved)
    assert torch.equal(velocity(again), velocity(model))
    assert "Their training is not recorded" in (tmp_path / "README.md").read_text()


def test_facts_are_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    again = GPDiT.from_pretrained(str(folder))
    assert again.facts.to_dict() == FACTS
    again.save_pretrained(tmp_path / "again")
    for name in ("config.json", "README.md", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_model_can_overwrite_the_file_that_it_is_mapped_from(folder: Path) -> None:
    model = GPDiT.from_pretrained(folder)
    before = velocity(model)
    with torch.no_grad():
        model.output.bias.add_(1)
    assert torch.equal(velocity(GPDiT.from_pretrained(folder)), before)  # the file is unchanged
    model.save_pretrained(folder)
    assert not torch.equal(velocity(model), before)
    assert torch.equal(velocity(GPDiT.from_pretrained(folder)), velocity(model))


def test_the_config_is_plain_json(folder: Path, model: GPDiT) -> None:
    content = json.loads((folder / "config.json").read_text())
    head = {name: content.pop(name) for name in ("format", "library_version", "checksums", "dtype", "config")}
    assert head["format"] == "gpdit_lightning-model-1"
    assert head["dtype"] == "float32"
    assert GPDiTConfig.preset(**head["config"]) == model.config
    assert content == FACTS
    assert content.keys() == TrainingFacts.SCHEMA.keys()


def test_settings_of_execution_are_not_saved(tiny_config: GPDiTConfig, tmp_path: Path) -> None:
    config = tiny_config.replaced(attention_backend="xformers", compile=True, activation_checkpointing=True)
    GPDiT(config).save_pretrained(tmp_path)
    assert GPDiT.from_pretrained(tmp_path).config == tiny_config


@pytest.mark.parametrize(
    ("saved", "loaded"), [("my_package.operator", "auto"), ("xformers", "auto"), ("sdpa", "auto"), ("auto", "auto")]
)
def test_a_file_of_weights_chooses_neither_code_to_import_nor_a_backend_of_one_device(
    folder: Path, saved: str, loaded: str
) -> None:
    settings = {"attention_backend": saved, "compile": True, "activation_checkpointing": True}
    edit(folder, lambda content: content["config"].update(settings))
    model = GPDiT.from_pretrained(folder)
    assert model.config.attention_backend == loaded
    assert not model.config.compile
    assert not model.config.activation_checkpointing
    assert velocity(model).isfinite().all()


def test_the_content_of_the_card(folder: Path) -> None:
    card = ModelCard((folder / "README.md").read_text())
    assert (card.data.library_name, card.data.pipeline_tag) == ("gpdit_lightning", "video-to-video")
    values = {result.metric_name: result.metric_value for result in card.data.eval_results or ()}
    assert values == {
        "Loss (validation, mean over quarters of the noise levels)": pytest.approx(1.75 / 3, abs=1e-6),
        "FVD ↓": 212.04,
        "Error relative to repeating the last frame ↓": 0.52,
    }
    protocol = "held-out videos: 64 clips decoded from latents, 8 frames from 5; adams sampler, 8 steps; FVD by I3D; "
    protocol += "computed during the training, at step 1,000"
    datasets = [result.dataset_name for result in card.data.eval_results or ()]
    assert datasets == ["held-out images", "held-out videos", protocol, protocol]
    assert f"| {protocol} | FVD ↓ | 212 (repeating the last frame: 310) |" in card.text
    assert f"| {protocol} | Error relative to repeating the last frame ↓ | 0.52 |" in card.text
    assert "runs/before" not in card.content
    for text in (
        "averaged (EMA) weights after 1,200 optimizer steps of MixedStage",
        f"| initial weights | of an earlier training of 7 steps (sha256 `{'0' * 16}`) |",
        "| noise schedule | cosine, shift 2 |",
        "| clips | up to 3 latent frames, at stride 3; 64x64 pixels |",
        "| data, videos | 5,000 samples, and 40 held out |",
        "| optimizer | AdamW: learning_rate 0.001, betas [0.9, 0.99] |",
        "| precision | bf16-mixed |",
        "| hardware | 8 x Accelerator |",
        "| held-out videos, step 1,100 | 0.5833 | 0.5000 | 0.2500 | - | 1.0000 |",
        "GPDiTPipeline.from_pretrained",
        "| width | `16` |",
        "one of 2 classes, listed in `config.json` by their numbers: `run`, `jump`.",
    ):
        assert text in card.text
    for text in ('"0123456789abcdef"', "[2.0, 0.5, 4.0, 1.0]", "sample --checkpoint", "from_pretrained", "License"):
        assert text in card.text


def test_the_card_abbreviates_a_long_list_of_classes(tiny_config: GPDiTConfig, tmp_path: Path) -> None:
    model = GPDiT(tiny_config.replaced(classes=40))
    names = [f"class {number}" for number in range(40)]
    model.facts = TrainingFacts(classes=tuple(names), data={"data.labels": names})
    model.save_pretrained(tmp_path)
    assert GPDiT.from_pretrained(tmp_path).facts == model.facts
    card = (tmp_path / "README.md").read_text()
    assert "one of 40 classes" in card
    assert "`class 0`, `class 1`, " in card
    assert "`class 8`, ..., `class 39`." in card
    assert "class 9`" not in card
    assert "class 20" not in card


def test_a_folder_without_the_fields_of_conditions(tiny_config: GPDiTConfig, tmp_path: Path) -> None:
    GPDiT(tiny_config).save_pretrained(tmp_path / "old")
    edit(tmp_path / "old", lambda content: [content["config"].pop(name) for name in ("classes", "text_width")])
    assert GPDiT.from_pretrained(tmp_path / "old").config == tiny_config


def test_non_contiguous_tensors_are_saved(model: GPDiT, tmp_path: Path) -> None:
    before = velocity(model)
    model.output.weight.data = model.output.weight.data.T.contiguous().T
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("output.weight"), model.output.weight)
    assert torch.equal(velocity(GPDiT.from_pretrained(tmp_path)), before)


def test_a_model_can_be_copied_and_pickled(model: GPDiT) -> None:
    assert torch.equal(velocity(copy.deepcopy(model)), velocity(model))
    assert torch.equal(velocity(pickle.loads(pickle.dumps(model))), velocity(model))


def test_push_to_hub_uploads_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = {}

    class FakeHub:
        def __init__(self, token: str | None) -> None: ...

        def create_repo(self, repo_id: str, **_: Any) -> SimpleNamespace:
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path: Path, **_: Any) -> str:
            pushed.update({path.name: path.read_bytes() for path in folder_path.iterdir()})
            return "https://hub"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", FakeHub)
    (folder / "codec.safetensors").write_bytes(b"a codec")
    write_checksums(folder)
    (folder / "sample.png").write_bytes(b"an image")
    card = (folder / "README.md").read_text().replace("## Use", "![Samples](sample.png)\n\n## Use")
    (folder / "README.md").write_text(card)
    model = GPDiT.from_pretrained(folder)
    assert model.push_to_hub("someone/gpdit") == "https://hub"
    assert pushed == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert b"![Samples](sample.png)" in pushed["README.md"]
    # Images, scores and text of the card are not those of other weights.
    pushed.clear()
    model.bfloat16().push_to_hub("someone/gpdit")
    assert pushed.keys() == {"model.safetensors", "config.json", "README.md", "codec.safetensors", "SHA256SUMS"}
    assert b"sample.png" not in pushed["README.md"]


def test_a_card_is_kept_if_it_was_edited_or_the_model_is_unchanged(folder: Path, tmp_path: Path) -> None:
    card = folder / "README.md"
    (folder / "sample.png").write_bytes(b"an image")
    write_exported(folder, read_exported(folder), CardDetails({"sample.png": "Samples."}))
    assert "![Samples.](sample.png)" in (text := card.read_text())
    model = GPDiT.from_pretrained(folder)
    model.save_pretrained(tmp_path / "same")
    assert (tmp_path / "same" / "README.md").read_text() == text
    with torch.no_grad():
        model.output.bias.add_(1)
    model.save_pretrained(folder)
    assert "sample.png" not in card.read_text()
    card.write_text("edited")
    model.save_pretrained(folder)
    assert card.read_text() == "edited"


def test_loading_from_the_hub(folder: Path, model: GPDiT, tmp_path: Path) -> None:
    """From the cache of huggingface_hub, without network access."""
    cache = tmp_path / "hub" / "models--someone--gpdit"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    (cache / "snapshots").mkdir()
    folder.rename(cache / "snapshots" / ("0" * 40))
    options: dict[str, Any] = {"cache_dir": tmp_path / "hub", "local_files_only": True}
    assert torch.equal(velocity(GPDiT.from_pretrained("someone/gpdit", **options)), velocity(model))
    with pytest.raises(InputError, match="someone/other is neither a folder nor a model that the hub provides"):
        GPDiT.from_pretrained("someone/other", **options)


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing is neither a folder nor a model that the hub"):
        GPDiT.from_pretrained(tmp_path / "missing")


# Invalid folders


def test_pickled_weights_are_not_opened(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt"):
        torch.save(Malicious(trace), folder / name)
    with pytest.raises(
        InputError, match=r"model\.safetensors does not exist, and weights in other files are not opened"
    ):
        GPDiT.from_pretrained(folder)
    torch.save(Malicious(trace), folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors is not a complete safetensors file"):
        GPDiT.from_pretrained(folder)
    assert not trace.exists()


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_truncated_weights_are_rejected(folder: Path, kept: float) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(InputError, match=r"model\.safetensors is not a complete safetensors file"):
        GPDiT.from_pretrained(folder)


@pytest.mark.parametrize("header", [b"\xff" * 8, b"\x00" * 8, b"\x08" + b"\x00" * 7 + b"[[[[[[[[", b"\x80\x02c"])
def test_an_invalid_header_is_rejected(folder: Path, header: bytes) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(header + path.read_bytes()[len(header) :])
    with pytest.raises(InputError, match=r"model\.safetensors is not a complete safetensors file"):
        GPDiT.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff", "[]", "3", "{}", '{"format": "other"}'])
def test_an_invalid_config_is_rejected(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"config\.json (is not readable JSON|has format)"):
        GPDiT.from_pretrained(folder)


def test_a_missing_config_is_reported(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        GPDiT.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("config", None, "config = None; it must be an object"),
        ("config", {"size": "tiny", "hooks": "os.system"}, "GPDiTConfig has no field 'hooks'"),
        ("config", {"size": ["tiny"]}, "size is ['tiny']; it must be of type str"),
        ("config", {"layers": "two"}, "layers is 'two'; it must be of type int"),
        ("config", {"layers": True}, "layers is True; it must be of type int"),
        ("config", {"attention": {}}, "attention '{}' is not known"),
        ("config", {"rope_lengths": 32}, "rope_lengths is 32"),
        ("config", {"rope_lengths": [32, 32, "32"]}, "rope_lengths is [32, 32, '32']"),
        ("weights", "best", "weights = 'best'; it must be ema or raw"),
        ("step", -1, "step = -1; it must be a non-negative integer"),
        ("codec", "pca", "codec = 'pca'; it must be an object"),
        ("codec", {"name": "pca"}, "lacks the field codec.source"),
        ("codec", FACTS["codec"] | {"source": 3}, "codec.source = 3; it must be a string or null"),
        ("codec", FACTS["codec"] | {"mean": 0.5}, "codec.mean = 0.5; it must be a non-empty list"),
        ("codec", FACTS["codec"] | {"std": [1.0, math.nan]}, "NaN is not a JSON value"),
        ("validation", {"step": 1}, "lacks the field validation.quarters"),
        (
            "validation",
            {"step": 1, "quarters": {"videos": [0.5, "a", 1, 1]}},
            "validation.quarters.videos[1] = 'a'; it",
        ),
        ("validation", {"step": 1, "quarters": {"videos": [0.5]}}, "has 1 numbers in validation.quarters.videos"),
        ("geometry", FACTS["geometry"] | {"stride": 0}, "geometry.stride = 0; it must be a positive integer"),
        ("geometry", FACTS["geometry"] | {"sizes": [[]]}, "geometry.sizes[0] = []; it must be a non-empty list"),
        ("geometry", FACTS["geometry"] | {"frames": 2**12}, "has a geometry far beyond any clip"),
        ("geometry", FACTS["geometry"] | {"sizes": [[64, 64], [2**13, 2**13]]}, "has a geometry far beyond any clip"),
        ("config", {"block_shape": [2**13, 0, 0]}, "block_shape is 8192; it must be at most 4,096"),
        ("data", {"data.context_noise": "0.1"}, "data.data.context_noise = '0.1'; it must be a finite number"),
        ("data", {"data.label_dropout": [1]}, "data.data.label_dropout = [1]; it must be a finite number"),
        ("run", {"samples": [1]}, "run.samples = [1]; it must be an object"),
        ("run", {"samples": {"videos": {"train": 1}}}, "lacks the field run.samples.videos.validation"),
        ("run", {"optimizer": "adamw"}, "run.optimizer = 'adamw'; it must be an object"),
        ("schedule", {"name": "cosine", "shift": "2"}, "schedule.shift = '2'; it must be a finite number"),
        ("origin", {"path": "a"}, "lacks the field origin.step"),
        ("origin", FACTS["origin"] | {"sha256": 3}, "origin.sha256 = 3; it must be a string or null"),
        ("classes", [], "classes = []; it must be a non-empty list"),
        ("classes", ["run", 2], "classes[1] = 2; it must be a string"),
        ("classes", ["a", "b", "c"], "names 3 classes where its architecture has 2: export the model again"),
    ],
)
def test_a_field_of_the_wrong_type_is_reported(folder: Path, name: str, value: Any, message: str) -> None:
    edit(folder, lambda content: content.update({name: value}))
    with pytest.raises(InputError) as caught:
        GPDiT.from_pretrained(folder)
    assert str(folder / "config.json") in str(caught.value)
    assert message in str(caught.value)


def test_an_origin_without_a_hash_is_read(folder: Path) -> None:
    edit(folder, lambda content: content["origin"].pop("sha256"))
    assert GPDiT.from_pretrained(folder).facts.origin == Origin("runs/before", 7)


def test_unknown_fields_are_ignored(folder: Path) -> None:
    edit(folder, lambda content: content.update(auto_map={"AutoModel": "evil.Model"}))
    assert GPDiT.from_pretrained(folder).facts.to_dict() == FACTS


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layers", 3, "has layers = 3 where its weights are of 2 layers"),
        ("layers", 1, "has layers = 1 where its weights are of 2 layers"),
        ("layers", 10**9, "layers is 1000000000; it must be at most 10,000"),
        ("width", 10**30, "width is 10"),
        ("norm_eps", -1.0, "norm_eps is -1.0"),
        ("mlp_width", 32, "where its architecture has shape (32, 16)"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_rejected(folder: Path, field: str, value: int, message: str) -> None:
    edit(folder, lambda content: content["config"].update({field: value}))
    with pytest.raises(InputError) as caught:
        GPDiT.from_pretrained(folder)
    assert message in str(caught.value)


def test_tensors_that_are_not_weights_are_rejected(folder: Path, model: GPDiT) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"output.bias": tensors["output.bias"].long()}, folder / "model.safetensors")
    write_checksums(folder)
    with pytest.raises(InputError, match=r"something other than floating-point numbers as output\.bias"):
        GPDiT.from_pretrained(folder)
    invalid: dict[str, Any] = {"output.bias": "text"}
    with pytest.raises(InputError, match=r"something other than floating-point numbers as output\.bias"):
        Weights(tensors | invalid, model.config, TrainingFacts()).check_fit()


@pytest.mark.parametrize(
    "options",
    [
        {"layers": 3},
        {"layers": 3, "time_conditioning": "adaln", "classes": 4},
        {"layers": 3, "time_conditioning": "rotation_modulation"},
        {"layers": 2, "factorized": True},
        {"layers": 2, "text_width": 5},
    ],
)
def test_the_shapes_of_an_architecture_are_those_of_the_network(options: dict[str, Any]) -> None:
    config = GPDiTConfig(size="custom", width=24, mlp_width=48, heads=2, **options)
    state = GPDiT(config).state_dict()
    assert shapes_of(config) == {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("layers", [range(0), range(9999, 10_000), range(1000)], ids=["none", "the last", "all"])
def test_a_network_of_many_layers_is_compared_with_its_tensors_before_it_is_built(folder: Path, layers: range) -> None:
    """Such a file has some hundred bytes for each layer, or none, and the network takes minutes to build."""
    count = 1000 if layers == range(1000) else 10_000
    save_file({f"blocks.{layer}.a": torch.zeros(1) for layer in layers}, folder / "model.safetensors")
    edit(folder, lambda content: content["config"].update(size="custom", layers=count, width=2**20, heads=2**10))
    start = time.process_time()
    with pytest.raises(InputError, match=r"(of \d layers|nothing as patch_embedding\.weight)"):
        GPDiT.from_pretrained(folder)
    assert time.process_time() - start < 5


# Hashes


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "codec.safetensors"])
@pytest.mark.parametrize("place", [0.5, 0.999])
def test_a_changed_byte_is_found_by_the_hashes(folder: Path, name: str, place: float) -> None:
    (folder / "codec.safetensors").write_bytes(b"a codec" * 100)
    write_checksums(folder)
    read_exported(folder)
    content = bytearray((folder / name).read_bytes())
    digits = [at for at in range(int(len(content) * place)) if name != "config.json" or chr(content[at]) in "234567"]
    content[digits[-1]] ^= 1  # one digit becomes another one in JSON
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} is not the file that was exported \(its sha256 is [0-9a-f]+\)"):
        read_exported(folder)


@pytest.mark.parametrize("when", ["header", "hash"])
def test_a_folder_that_is_replaced_while_it_is_read_is_never_a_mixture(
    folder: Path, model: GPDiT, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    other = GPDiT(model.config).eval()
    other.facts = replace(model.facts, step=model.facts.step + 1)
    function = "safetensors_header" if when == "header" else "verify_checksums"
    original = getattr(exported, function)

    def read_then_replace(*arguments: Any) -> Any:
        result = original(*arguments)
        monkeypatch.setattr(exported, function, original)
        other.save_pretrained(folder)
        return result

    monkeypatch.setattr(exported, function, read_then_replace)
    loaded = GPDiT.from_pretrained(folder)  # read again from the beginning
    assert loaded.facts == other.facts
    assert torch.equal(velocity(loaded), velocity(other))
    opened = read_exported(folder)
    model.save_pretrained(folder)
    with pytest.raises(InputError, match=r"model.safetensors changed while it was read"):
        opened.read_all()


def test_the_hashes_are_those_of_sha256sum_and_an_earlier_folder_has_none(folder: Path, caplog: Any) -> None:
    lines = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
    names = ("config.json", "model.safetensors")
    assert lines == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "codec.safetensors").write_bytes(b"of another model")
    with pytest.raises(InputError, match=r"codec\.safetensors is none of the files that .*SHA256SUMS lists: remove it"):
        read_exported(folder)
    (folder / "codec.safetensors").unlink()
    (folder / "SHA256SUMS").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"SHA256SUMS does not have one hash for each of config\.json and"):
        read_exported(folder)
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(InputError, match=r"SHA256SUMS does not exist, so the files cannot be verified: "):
        read_exported(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["checksums"]
    (folder / "config.json").write_text(json.dumps(config))
    caplog.set_level("INFO", "gpdit_lightning")
    GPDiT.from_pretrained(folder)
    assert caplog.text.count("has no SHA256SUMS") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused_by_name(folder: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["blocks.1.mlp_norm.weight"][3] = math.inf
    save_file(tensors, folder / "model.safetensors")
    write_checksums(folder)
    with pytest.raises(InputError, match=r"numbers in blocks\.1\.mlp_norm\.weight that are not finite"):
        GPDiT.from_pretrained(folder)


def test_weights_of_mixed_types_are_refused_by_name(folder: Path) -> None:
    """Those of the linear layers of blocks may have another type than all else, as after a cast for generation."""
    tensors = load_file(folder / "model.safetensors")
    linear = [name for name, tensor in tensors.items() if name.startswith("blocks.") and tensor.ndim == 2]
    biases = [name.removesuffix("weight") + "bias" for name in linear]
    cast = {name: tensor.half() if name in (*linear, *biases) else tensor for name, tensor in tensors.items()}

    def load(weights: dict[str, torch.Tensor]) -> GPDiT:
        save_file(weights, folder / "model.safetensors")
        write_checksums(folder)
        return GPDiT.from_pretrained(folder)

    assert load(cast).blocks[0].query.weight.dtype == torch.float16
    for mixed in (cast | {linear[-1]: tensors[linear[-1]]}, tensors | {"output.bias": tensors["output.bias"].half()}):
        with pytest.raises(
            InputError, match=r"of torch\.float\d\d where similar weights are of torch\.float\d\d: export"
        ):
            load(mixed)
