# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # A tour in Python
#
# From videos to a generated video at the smallest size, in about a minute on a CPU. This file is a notebook
# (`jupytext --to ipynb docs/tour.py`, or open it in an editor with cells) and a script (`python docs/tour.py`).

# %%
import tempfile
from pathlib import Path

import torch

from gpdit_lightning import GPDiT, GPDiTConfig, GPDiTPipeline

FOLDER = Path(tempfile.mkdtemp(prefix="gpdit_tour_"))
STEPS = 100  # of the training; some thousands give a good model

# %% [markdown]
# ## Videos
#
# A square moves to the right, in another colour and row in each video: 48 frames at 64x64 pixels, uint8 (T, 3, H, W).

# %%
from gpdit_lightning.media.video_writer import write_video


def moving_square(number: int) -> torch.Tensor:
    """Return the frames of a video."""
    draw = torch.Generator().manual_seed(number)
    colour = torch.randint(64, 256, (3, 1, 1), generator=draw, dtype=torch.uint8)
    top, left = torch.randint(0, 48, (2,), generator=draw).tolist()
    frames = torch.full((48, 3, 64, 64), 16, dtype=torch.uint8)
    for t, frame in enumerate(frames):
        x = (left + t) % 48
        frame[:, top : top + 16, x : x + 16] = colour
    return frames


(FOLDER / "videos").mkdir()
for number in range(24):
    write_video(FOLDER / "videos" / f"{number}.mp4", moving_square(number), fps=24)

# %% [markdown]
# ## Latents
#
# `prepare` encodes them once, by the codec `pca`, which ships with the package: 4 frames and 8x8 pixels become a vector
# of 16 numbers. The result is a folder of WebDataset shards with a manifest; some files are held out for validation.

# %%
from gpdit_lightning.preparation import PrepareOptions, prepare

manifest = prepare(
    PrepareOptions(
        videos=FOLDER / "videos",
        out=FOLDER / "latents",
        codec="pca",
        video_sizes="64x64",
        stride=1,
        clip_frames=17,
        least_clip_frames=17,
    )
)
assert manifest is not None
for shard in manifest.shards:
    print(shard.path, shard.split, shard.kind, shard.shape, shard.count, "samples")

# %% [markdown]
# ## Training
#
# A recipe that ships, an overlay for a small size, and options: as on the command line. The run folder has the resolved
# recipe, checkpoints, previews and TensorBoard's curves. The same call after an interruption resumes.

# %%
from gpdit_lightning.cli.fit import fit
from gpdit_lightning.options.shared import RecipeOptions

fit(
    RecipeOptions(
        config=["gpdit:stage2_mixed", "gpdit:tiny"],
        overrides={
            "data_dir": str(FOLDER / "latents"),
            "run_dir": str(FOLDER / "run"),
            "trainer.max_steps": STEPS,
            "trainer.enable_progress_bar": False,
            "validate_every_steps": STEPS,
            "preview.every_steps": STEPS,
        },
    )
)

# %% [markdown]
# The curves are ordinary TensorBoard events.

# %%
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

events = EventAccumulator(str(FOLDER / "run"))
events.Reload()
losses = [event.value for event in events.Scalars("loss/train")]
print(f"loss/train: {losses[0]:.3f} at the beginning, {losses[-1]:.3f} at the end")

# %% [markdown]
# ## Generation
#
# The pipeline continues a video, here from 5 given frames. With so few steps of training the result is blurred.

# %%
pipeline = GPDiTPipeline.from_pretrained(FOLDER / "run")
result = pipeline(str(FOLDER / "videos" / "0.mp4"), context_frames=5, frames=12, steps=8, sampler="adams", seed=0)
print(result.save(FOLDER / "continued.mp4", mark=True))
result.frames[0][-1]  # an image of Pillow

# %% [markdown]
# ## The network alone
#
# Inside, a model maps noisy latents, their angles and the clean latents before them to velocities. Here one step of
# training by hand, with the equations of docs/mathematics.md.

# %%
model = GPDiT(GPDiTConfig.preset("tiny"))
x0 = torch.randn(2, 5, 16, 8, 8)  # (clips, latent frames, channels, height, width)
theta = torch.rand(2, 5) * torch.pi / 2  # an angle for each frame
noise = torch.randn_like(x0)
cos, sin = (f(theta)[..., None, None, None] for f in (torch.cos, torch.sin))
predicted = model(cos * x0 + sin * noise, theta, x0)
loss = torch.nn.functional.mse_loss(predicted, -sin * x0 + cos * noise)
loss.backward()
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, loss {loss.item():.3f}")

# %% [markdown]
# Next: your own data (docs/tutorials/own_data.md), other systems (docs/systems.md), custom parts (docs/extending.md).
