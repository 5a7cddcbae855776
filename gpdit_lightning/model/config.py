"""Configuration of a GPDiT: its architecture, which checkpoints store, and its execution."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from gpdit_lightning.errors import InputError

AttentionVariant = Literal["of2", "of"]
TimeSite = Literal["branch", "branch_inverse", "input", "residual", "none"]

# GPDiT, Table 1 (B and H); "tiny" is ours, for tests and laptops.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"layers": 4, "width": 192, "mlp_width": 768, "heads": 6},
    "B": {"layers": 12, "width": 768, "mlp_width": 3072, "heads": 12},
    "H": {"layers": 24, "width": 2816, "mlp_width": 11264, "heads": 22},
}

SIZE_FIELDS = ("layers", "width", "mlp_width", "heads")
CUSTOM_SIZE = "custom"

# Fields that change how the network is executed, but not the function that it computes.
EXECUTION_FIELDS = ("attention_backend", "activation_checkpointing", "compile")

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
    """Named size that sets `layers`, `width`, `mlp_width` and `heads` where they are 0: tiny, B (85M) or H (2.28B). If
    the four are those of no named size, it becomes custom; if they are those of another one, they are refused."""
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
    attention: AttentionVariant = "of2"
    """The clean frames that a clean frame attends to: of2 = itself and all previous ones (GPDiT 4.1.1), of = itself
    only (4.1.2). For H at 240 tokens per frame, of saves 0.9 % of the training FLOPs at 5 latent frames and 3 % at 12:
    23 % and 37 % of the attention products, which are a small part of the whole."""
    time_site: TimeSite = "branch"
    """Where hidden channel pairs are rotated by theta (GPDiT 4.2, "for each block"): branch = inputs of attention, MLP
    and output layer; branch_inverse = the same, undone at the branch outputs; input = once after the patch embedding;
    residual = the residual stream before every block; none = never."""
    rope_lengths: tuple[int, int, int] = (32, 32, 32)
    """Maximum extent (frames, rows, columns), in tokens, that determines the RoPE bases (ACDiT 4.2); part of the
    architecture, independent of inputs."""
    classes: int = 0
    """Number of class labels; a label is a condition by a token that noisy frames attend to; 0: none."""
    text_width: int = 0
    """Width of text embeddings; a text is a condition by tokens that noisy frames attend to; 0: none. No stage trains
    on texts yet, and training refuses it."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    attention_backend: str = "auto"
    """Operator that computes attention: auto = xformers on CUDA if it is installed, else PyTorch's SDPA; sdpa;
    xformers (CUDA only); a registered name; or the import path of a callable (query, key, value) -> output, see
    model/attention/backends.py."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of storing its activations: less memory, a third more time."""
    compile: bool = False
    """Train with blocks compiled by torch.compile, about a minute for every new shape of a batch. Validation and
    generation are not compiled. On the CPU it needs a C++ compiler."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, allowed = getattr(self, field.name), PLAIN_TYPES.get(field.type)
            if allowed and type(value) not in allowed:
                raise InputError(f"{field.name} is {value!r}; it must be of type {allowed[-1].__name__}.")
        if self.size not in (*SIZES, CUSTOM_SIZE):
            raise InputError(f"size '{self.size}' is not known: choose one of {', '.join(SIZES)}.")
        for name, value in SIZES.get(self.size, {}).items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)
        values = {name: getattr(self, name) for name in SIZE_FIELDS}
        of_fields = next((size for size in SIZES if SIZES[size] == values), CUSTOM_SIZE)
        if CUSTOM_SIZE not in (self.size, of_fields) and self.size != of_fields:
            raise InputError(
                f"size is {self.size}, but {', '.join(SIZE_FIELDS)} are those of {of_fields}: leave them at 0 (in "
                f"Python: config.replaced(size='{self.size}')), or give size {of_fields}."
            )
        object.__setattr__(self, "size", of_fields)
        lengths = tuple(self.rope_lengths) if isinstance(self.rope_lengths, list | tuple) else ()
        if [type(length) for length in lengths] != [int] * 3 or min(lengths) < 1:
            raise InputError(f"rope_lengths is {self.rope_lengths}; it must be three positive numbers of tokens.")
        object.__setattr__(self, "rope_lengths", lengths)
        for name, kind in (("attention", AttentionVariant), ("time_site", TimeSite)):
            choices = get_args(kind)
            if getattr(self, name) not in choices:
                raise InputError(f"{name} '{getattr(self, name)}' is not known: choose one of {', '.join(choices)}.")
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

    @classmethod
    def preset(cls, size: str = "B", **overrides: Any) -> "GPDiTConfig":
        """Return the configuration of a named size, with any field overridden.

        Raises:
            InputError: `size` or a field is unknown, or the fields are those of another size.
        """
        known = {field.name for field in fields(cls)}
        for name in overrides:
            if name not in known:
                raise InputError(f"GPDiTConfig has no field '{name}': the fields are {', '.join(sorted(known))}.")
        return cls(size=size, **overrides)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "GPDiTConfig":
        """Return the configuration that `to_dict` stored, also by an earlier version.

        Earlier versions stored the name of the recipe's size, whatever the fields were; the fields determine the size.

        Raises:
            InputError: a field is unknown or its value is not valid.
        """
        complete = all(stored.get(name) for name in SIZE_FIELDS)
        return cls.preset(**{**stored, "size": CUSTOM_SIZE} if complete else stored)

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
        return asdict(self) | {"rope_lengths": list(self.rope_lengths)}

    def replaced(self, **overrides: Any) -> "GPDiTConfig":
        """Return a copy with some fields changed; a new `size` sets its four fields, unless they are given too.

        `dataclasses.replace` keeps the four fields: it refuses to replace one named size by another.
        """
        if "size" in overrides:
            overrides = dict.fromkeys(SIZE_FIELDS, 0) | overrides
        return replace(self, **overrides)
