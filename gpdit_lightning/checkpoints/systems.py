"""The systems that a backbone can be: their names, descriptions and papers, for model cards (docs/systems.md)."""

from dataclasses import dataclass

from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.names import counted

GPDIT_PAPER = """@article{zhang2025gpdit,
  title = {Generative Pre-trained Autoregressive Diffusion Transformer},
  author = {Zhang, Yuan and Jiang, Jiacheng and Ma, Guoqing and Lu, Zhiying and Huang, Haoyang and Yuan, Jianlong and
    Duan, Nan and Jiang, Daxin},
  journal = {arXiv preprint arXiv:2505.07344},
  year = {2025}
}"""
ACDIT_PAPER = """@article{hu2024acdit,
  title = {{ACDiT}: Interpolating Autoregressive Conditional Modeling and Diffusion Transformer},
  author = {Hu, Jinyi and Hu, Shengding and Song, Yuxuan and Huang, Yufei and Wang, Mingxuan and Zhou, Hao and
    Liu, Zhiyuan and Ma, Wei-Ying and Sun, Maosong},
  journal = {arXiv preprint arXiv:2412.07720},
  year = {2024}
}"""
VIDGPT_PAPER = """@article{gao2024vidgpt,
  title = {{ViD-GPT}: Introducing {GPT}-style Autoregressive Generation in Video Diffusion Models},
  author = {Gao, Kaifeng and Shi, Jiaxin and Zhang, Hanwang and Wang, Chunping and Xiao, Jun},
  journal = {arXiv preprint arXiv:2406.10981},
  year = {2024}
}"""
DIT_PAPER = """@inproceedings{peebles2023dit,
  title = {Scalable Diffusion Models with Transformers},
  author = {Peebles, William and Xie, Saining},
  booktitle = {International Conference on Computer Vision},
  year = {2023}
}"""

CONDITIONING = {"rotation": "a rotation of pairs of hidden channels", "adaln": "adaLN-Zero"}
TARGETS = {"velocity": "the velocity", "epsilon": "the noise"}


@dataclass(frozen=True)
class System:
    """A system, as its model card describes it.

    Attributes:
        name: the title.
        introduction: one sentence with the system's paper.
        tags: of the hub.
        papers: BibTeX entries.
    """

    name: str
    introduction: str
    tags: tuple[str, ...]
    papers: tuple[str, ...]


def system_of(config: GPDiTConfig, makes_images: bool) -> System:
    """Return the system of an architecture, by its blocks, attention and time conditioning.

    Args:
        config: the architecture.
        makes_images: whether it was trained on single latent frames.
    """
    medium = "image" if makes_images else "video"
    of_frame = config.block_shape == (1, 0, 0)
    is_rotated = config.time_conditioning == "rotation"
    if config.block_shape == (0, 0, 0) or (of_frame and makes_images and not is_rotated):
        system = _full_sequence(config, medium)
    elif config.causal_in_block or config.factorized:
        system = _vidgpt(config)
    elif of_frame and is_rotated:
        system = _gpdit(makes_images)
    else:
        system = _acdit(config, medium, GPDIT_PAPER if is_rotated else None)
    sentence = (
        f"The noise level enters by {CONDITIONING[config.time_conditioning]}, and the network predicts "
        f"{TARGETS[config.target]}."
    )
    return System(
        system.name, f"{system.introduction} {sentence}", (f"{medium}-generation", *system.tags), system.papers
    )


def _gpdit(makes_images: bool) -> System:
    introduction = (
        "A generative pre-trained autoregressive diffusion transformer ([GPDiT](https://arxiv.org/abs/2505.07344)): "
        "it generates the latents of a video frame by frame, each frame denoised given the clean frames before it."
    )
    if makes_images:
        introduction += " It was trained on images, each of which is one frame."
    return System("GPDiT", introduction, ("video-prediction", "diffusion", "autoregressive", "gpdit"), (GPDIT_PAPER,))


def _acdit(config: GPDiTConfig, medium: str, further_paper: str | None) -> System:
    introduction = (
        "An autoregressive blockwise conditional diffusion transformer ([ACDiT](https://arxiv.org/abs/2412.07720)): it "
        f"generates the latents of {_a(medium)} block by block, each block denoised given the clean blocks before it. "
        f"A block has {_block(config)}."
    )
    papers = (ACDIT_PAPER,) if further_paper is None else (ACDIT_PAPER, further_paper)
    return System("ACDiT", introduction, ("diffusion", "autoregressive", "acdit"), papers)


def _vidgpt(config: GPDiTConfig) -> System:
    space_and_time = ", with separate attention within frames and along time" if config.factorized else ""
    introduction = (
        "A causal video diffusion transformer in the form of [ViD-GPT](https://arxiv.org/abs/2406.10981): after a "
        "prompt of clean frames it generates the latents of a video chunk by chunk, and no frame attends to later "
        f"ones{space_and_time}. A chunk has {_block(config)}."
    )
    return System(
        "ViD-GPT", introduction, ("video-prediction", "diffusion", "autoregressive", "vid-gpt"), (VIDGPT_PAPER,)
    )


def _full_sequence(config: GPDiTConfig, medium: str) -> System:
    whole = f"all latents of {_a(medium)}"
    if config.first_block_frames:
        whole = f"all frames of a video after the first {_frames(config.first_block_frames)}, its context,"
    introduction = (
        f"A diffusion transformer ([DiT](https://arxiv.org/abs/2212.09748)) that denoises {whole} together, with full "
        "attention."
    )
    return System("Full-sequence diffusion transformer", introduction, ("diffusion", "dit"), (DIT_PAPER,))


def _block(config: GPDiTConfig) -> str:
    """Return the extent of a block in words."""
    first, frames = config.block_frames
    _, rows, columns = config.block_shape
    if rows or columns:
        extent = f"{rows or 'all'} x {columns or 'all'} tokens"
        return extent if frames == 1 else f"{extent} of {_frames(frames)}"
    return _frames(frames) if first == frames else f"{_frames(frames)}, and the first one {first}"


def _frames(number: int) -> str:
    return counted(number, "latent frame") if number else "all frames"


def _a(medium: str) -> str:
    return f"{'an' if medium == 'image' else 'a'} {medium}"
