"""Configuration of a GPDiT: its architecture, which checkpoints store, and its execution."""

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from gpdit_lightning.errors import InputError

AttentionVariant = Literal["of2", "of"]
TimeConditioningName = Literal["rotation", "adaln", "rotation_modulation", "embedding"]
TimeSite = Literal["branch", "branch_inverse", "input", "residual", "none"]
Target = Literal["velocity", "epsilon"]

# GPDiT, Table 1 (B and H); ACDiT, Table 1, whose B is the same as GPDiT's; "tiny" is ours, for tests and laptops.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"layers": 4, "width": 192, "mlp_width": 768, "heads": 6},
    "B": {"layers": 12, "width": 768, "mlp_width": 3072, "heads": 12},
    "H": {"layers": 24, "width": 2816, "mlp_width": 11264, "heads": 22},
    "acdit-b": {"layers": 12, "width": 768, "mlp_width": 3072, "heads": 12},
    "acdit-l": {"layers": 24, "width": 1024, "mlp_width": 4096, "heads": 16},
    "acdit-xl": {"layers": 28, "width": 1152, "mlp_width": 4608, "heads": 18},
    "acdit-h": {"layers": 32, "width": 1280, "mlp_width": 5120, "heads": 20},
}

SIZE_FIELDS = ("layers", "width", "mlp_width", "heads")
CUSTOM_SIZE = "custom"

# ACDiT for images of ImageNet (section 5.1): 256x256 pixels are 32x32 latent pixels of Stable Diffusion's VAE.
ACDIT: dict[str, Any] = {
    "block_shape": (1, 16, 16),
    "time_conditioning": "adaln",
    "target": "epsilon",
    "latent_channels": 4,
    "patch_size": 1,
    "classes": 1000,
}
PRESETS: dict[str, dict[str, Any]] = {
    name: {"size": name, **ACDIT} for name in ("acdit-b", "acdit-l", "acdit-xl", "acdit-h")
}

# Fields that change how the network is executed, but not the function that it computes.
EXECUTION_FIELDS = ("attention_backend", "activation_checkpointing", "compile", "float8")

# Upper limits of the fields, far beyond any model, since a file may contain any number, and building takes long.
LIMITS = {
    "layers": 10_000,
    **dict.fromkeys(("width", "mlp_width", "heads", "latent_channels", "text_width"), 2**20),
    "patch_size": 2**10,
    "classes": 2**24,
    "rope_lengths": 2**20,
    **dict.fromkeys(("block_shape", "first_block_frames"), 2**12),
}

# Accepted types of values for each type of field; values may come from a file.
PLAIN_TYPES: dict[Any, tuple[type, ...]] = {str: (str,), int: (int,), float: (int, float), bool: (bool,)}


@dataclass(frozen=True)
class GPDiTConfig:
    """Architecture and execution options of a :class:`~gpdit_lightning.GPDiT`.

    Raises:
        InputError: an option is unknown, a value has the wrong type, the size contradicts its fields, or the widths
            cannot be split into heads, channel pairs and RoPE axes.
    """

    size: str = "B"
    """Named size that sets `layers`, `width`, `mlp_width` and `heads` where they are 0: tiny, B (85M), H (2.28B), or
    acdit-b (the same as B), acdit-l, acdit-xl, acdit-h (ACDiT, Table 1). If the four are those of no named size, it
    becomes custom; if they are those of another one, they are refused."""
    layers: int = 0
    """Number of transformer blocks; 0: as `size`."""
    width: int = 0
    """Hidden width D; 0: as `size`."""
    mlp_width: int = 0
    """Width of the hidden layer of each MLP; 0: as `size`."""
    heads: int = 0
    """Attention heads; the head width is width / heads; 0: as `size`."""
    latent_channels: int = 16
    """Channels C of a latent frame (16 for WanVAE)."""
    patch_size: int = 2
    """Side of the square patch of latent pixels that becomes one token."""
    block_shape: tuple[int, int, int] = (1, 0, 0)
    """Frames, rows and columns, in tokens, of a block, the unit of autoregression, which has one noise level; 0: as
    many as there are. (1, 0, 0) is GPDiT, whose block is a frame; (4, 0, 0) and (1, 16, 16) are ACDiT for videos and
    for images; (0, 0, 0) is the diffusion of the whole clip at once."""
    first_block_frames: int = 0
    """Frames of the first block, if it has others than the following ones; 0: it has as many. With block_shape
    (0, 0, 0): the frames of the context, which one block of all other frames continues."""
    causal_in_block: bool = False
    """Whether a frame attends to no later frame of its block, as in ViD-GPT; the frames of a block are denoised
    together in any case."""
    factorized: bool = False
    """Whether each block of the transformer has an attention within frames and then one along time, at each place of a
    frame, as in ViD-GPT, in place of one attention over all tokens."""
    attention: AttentionVariant = "of2"
    """The clean blocks that a clean block attends to: of2 = itself and all previous ones (GPDiT 4.1.1, ACDiT 4.1), of =
    itself only (GPDiT 4.1.2). For H at 240 tokens per frame, of saves 0.9 % of the training FLOPs at 5 latent frames
    and 3 % at 12: 23 % and 37 % of the attention products, which are a small part of the whole."""
    time_conditioning: TimeConditioningName = "rotation"
    """How noisy tokens receive theta: rotation = of hidden channel pairs, without parameters (GPDiT 4.2), see
    `time_site`; the others embed theta and add the class label to the embedding: adaln = adaLN-Zero (DiT; ACDiT 4.2);
    rotation_modulation = the same with learned rotations of channel pairs in place of the shifts (arXiv:2505.19122);
    embedding = the embedding is added to the noisy tokens after the patch embedding."""
    time_site: TimeSite = "branch"
    """Where the rotation multiplies hidden channel pairs (GPDiT 4.2, "for each block"): branch = inputs of attention,
    MLP and output layer; branch_inverse = the same, undone at the branch outputs; input = once after the patch
    embedding; residual = the residual stream before every block; none = never."""
    rope_lengths: tuple[int, int, int] = (32, 32, 32)
    """Maximum extent (frames, rows, columns), in tokens, that determines the RoPE bases (ACDiT 4.2); part of the
    architecture, independent of inputs."""
    classes: int = 0
    """Number of class labels; 0: none. With rotation, a label is a token that noisy frames attend to; with another time
    conditioning it is added to the embedding of theta."""
    text_width: int = 0
    """Width of text embeddings; a text is a condition by tokens that noisy frames attend to; 0: none. No stage trains
    on texts yet, and training refuses it."""
    target: Target = "velocity"
    """What the network predicts: the velocity (GPDiT 4.2), or epsilon, the noise (ACDiT, DDPM)."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    attention_backend: str = "auto"
    """How attention is computed. With one call per block: xformers, sdpa (PyTorch's), sdpa_fa3 or sdpa_fa4 (PyTorch's
    with FlashAttention 3 or 4 if installed). With one call per layer: xformers_block_diagonal, flex_attention. Or a
    registered name, or the import path of a callable (query, key, value) -> output, see docs/extending.md. auto: on
    CUDA, training takes the fastest at its shapes, and generation xformers if installed, else sdpa; sdpa elsewhere."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of storing its activations: less memory, a third more time."""
    compile: bool = False
    """Train with blocks compiled by torch.compile, about a minute for every new shape of a batch. Validation and
    generation are not compiled. On the CPU it needs a C++ compiler."""
    float8: bool = False
    """Train with the matrix products of the blocks in float8, by torchao (installed separately), on GPUs of compute
    capability 8.9 or higher, with ddp or fsdp2; it saves time with `compile` only."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, allowed = getattr(self, field.name), PLAIN_TYPES.get(field.type)
            if allowed and type(value) not in allowed:
                raise InputError(f"{field.name} is {_shown(value)}; it must be of type {allowed[-1].__name__}.")
            self._check_limit(field.name)
        if not 0 < self.norm_eps <= 1:
            raise InputError(f"norm_eps is {_shown(self.norm_eps)}; it must be above 0 and at most 1.")
        if self.size not in (*SIZES, CUSTOM_SIZE):
            raise InputError(f"size '{self.size}' is not known: choose one of {', '.join(SIZES)}.")
        for name, value in SIZES.get(self.size, {}).items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)
        values = {name: getattr(self, name) for name in SIZE_FIELDS}
        of_fields = next((size for size in SIZES if SIZES[size] == values), CUSTOM_SIZE)
        if CUSTOM_SIZE not in (self.size, of_fields) and SIZES[self.size] != values:
            raise InputError(
                f"size is {self.size}, but {', '.join(SIZE_FIELDS)} are those of {of_fields}: leave them at 0 (in "
                f"Python: config.replaced(size='{self.size}')), or give size {of_fields}."
            )
        object.__setattr__(self, "size", of_fields)
        self._set_triple("rope_lengths", 1, "three positive numbers of tokens")
        self._set_triple("block_shape", 0, "three numbers (frames, rows, columns), 0 for as many as there are")
        self._check_blocks()
        choices_of = {
            "attention": AttentionVariant,
            "time_conditioning": TimeConditioningName,
            "time_site": TimeSite,
            "target": Target,
        }
        for name, kind in choices_of.items():
            choices = get_args(kind)
            if getattr(self, name) not in choices:
                value = getattr(self, name)
                text = value if isinstance(value, str) else _shown(value)
                raise InputError(f"{name} '{text}' is not known: choose one of {', '.join(choices)}.")
        for name in (*SIZE_FIELDS, "latent_channels", "patch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("classes", "text_width"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must not be negative.")
        if self.classes and self.text_width:
            raise InputError(
                f"classes {self.classes} and text_width {self.text_width} exclude each other: set one to 0."
            )
        if self.width % self.heads:
            raise InputError(f"width {self.width} does not divide into {self.heads} heads: choose a multiple of heads.")
        if self.head_width % 2 or self.head_width < 6:
            raise InputError(
                f"head width {self.head_width} (width {self.width} / heads {self.heads}) cannot be split into the "
                "channel pairs of three RoPE axes: choose an even head width of at least 6."
            )

    def _check_limit(self, name: str) -> None:
        """Raise InputError if a number, or one of several, is above the limit of its field."""
        value, limit = getattr(self, name), LIMITS.get(name)
        for number in value if isinstance(value, list | tuple) else (value,):
            if limit is not None and type(number) is int and number > limit:
                raise InputError(f"{name} is {_shown(number)}; it must be at most {limit:,}.")

    def _set_triple(self, name: str, least: int, meaning: str) -> None:
        value = getattr(self, name)
        triple = tuple(value) if isinstance(value, list | tuple) else ()
        if [type(number) for number in triple] != [int] * 3 or min(triple) < least:
            raise InputError(f"{name} is {_shown(value)}; it must be {meaning}.")
        object.__setattr__(self, name, triple)

    def _check_blocks(self) -> None:
        """Raise InputError unless the fields that concern blocks agree."""
        if self.first_block_frames < 0:
            raise InputError(f"first_block_frames is {self.first_block_frames}; it must not be negative.")
        options = {
            "first_block_frames": self.first_block_frames,
            "causal_in_block": self.causal_in_block,
            "factorized": self.factorized,
        }
        used = [name for name, value in options.items() if value]
        if used and not self.whole_frames:
            raise InputError(
                f"{' and '.join(used)} must not be set, since block_shape {self.block_shape} divides frames: leave out "
                "one of them, or give block_shape 0 rows and 0 columns."
            )
        if self.factorized and self.has_prefix:
            raise InputError(
                "factorized attention takes no condition as tokens: leave out text_width, and with classes set "
                "time_conditioning to adaln."
            )
        if self.time_conditioning != "rotation" and self.time_site != "branch":
            raise InputError(
                f"time_site is {self.time_site}, which is an option of the rotation, but time_conditioning is "
                f"{self.time_conditioning}: leave out one of them."
            )

    @classmethod
    def preset(cls, size: str = "B", **overrides: Any) -> "GPDiTConfig":
        """Return the configuration of a named size, or of acdit-b, -l, -xl or -h, with any field overridden.

        Raises:
            InputError: `size` or a field is unknown, or the fields are those of another size.
        """
        known = {field.name for field in fields(cls)}
        for name in overrides:
            if name not in known:
                raise InputError(f"GPDiTConfig has no field '{name}': the fields are {', '.join(sorted(known))}.")
        return cls(**({"size": size} | (PRESETS.get(size, {}) if isinstance(size, str) else {}) | overrides))

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "GPDiTConfig":
        """Return the configuration that `to_dict` stored, also by an earlier version.

        Earlier versions stored the name of the recipe's size, whatever the fields were; the fields determine the size.

        Raises:
            InputError: a field is unknown or its value is not valid.
        """
        if not isinstance(stored.get("size", ""), str):
            raise InputError(f"size is {_shown(stored['size'])}; it must be of type str.")
        complete = all(stored.get(name) for name in SIZE_FIELDS)
        return cls.preset(**{**stored, "size": CUSTOM_SIZE} if complete else stored)

    @property
    def has_prefix(self) -> bool:
        """Return whether a condition is tokens, to which noisy frames attend."""
        return self.text_width > 0 or (self.classes > 0 and self.time_conditioning == "rotation")

    @property
    def num_branches(self) -> int:
        """Return the number of branches of a block of the transformer, which are its attentions and its MLP."""
        return 3 if self.factorized else 2

    @property
    def modulation_widths(self) -> tuple[int, ...]:
        """Return the widths of what the embedding of theta gives each branch; the last one, a gate, not to the output.

        They are those of shift, scale and gate with adaln, of angles, scale and gate with rotation_modulation; none
        with another time conditioning.
        """
        first = {"adaln": self.width, "rotation_modulation": self.width // 2}.get(self.time_conditioning)
        return () if first is None else (first, self.width, self.width)

    @property
    def whole_frames(self) -> bool:
        """Return whether blocks are whole frames, and not parts of them."""
        return self.block_shape[1:] == (0, 0)

    @property
    def block_frames(self) -> tuple[int, int]:
        """Return the latent frames of the first block, 0: all of a clip; and of a later block, 0: all others."""
        return self.first_block_frames or self.block_shape[0], self.block_shape[0]

    @property
    def takes_context(self) -> bool:
        """Return whether a clip can have a context, and is not always one block."""
        return self.block_frames[0] > 0

    @property
    def head_width(self) -> int:
        """Return the number of channels of one attention head."""
        return self.width // self.heads

    @property
    def rope_widths(self) -> tuple[int, int, int]:
        """Return the head channels of the (frame, row, column) axes: even, a third each, the rest to frames."""
        side = 2 * (self.head_width // 6)
        return self.head_width - 2 * side, side, side

    def architecture(self) -> dict[str, Any]:
        """Return the fields that determine the function of the network, given its weights."""
        ignored = ("size", *EXECUTION_FIELDS)
        return {name: value for name, value in asdict(self).items() if name not in ignored}

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values; `GPDiTConfig.from_dict` restores the configuration."""
        return asdict(self) | {name: list(getattr(self, name)) for name in ("rope_lengths", "block_shape")}

    def replaced(self, **overrides: Any) -> "GPDiTConfig":
        """Return a copy with some fields changed; a new `size` sets its four fields, unless they are given too.

        `dataclasses.replace` keeps the four fields: it refuses to replace one named size by another.
        """
        if "size" in overrides:
            overrides = dict.fromkeys(SIZE_FIELDS, 0) | overrides
        return replace(self, **overrides)


def _shown(value: Any) -> str:
    """Return the `repr` of a value, shortened, since a file may contain a value of any size."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a value of type {type(value).__name__}"
