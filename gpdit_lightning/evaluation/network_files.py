"""Files of networks: checked by sha256 before they are opened, and opened without unpickling anything."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from gpdit_lightning.errors import InputError
from gpdit_lightning.files import sha256_of
from gpdit_lightning.options.evaluate import NetworkFile

I3D_ADDRESS = "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1"
I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
INCEPTION_ADDRESS = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"

Role = Literal["video", "image", "classifier"]
CURES: dict[Role, str] = {
    "video": f"give I3D's weights as .safetensors, or i3d_torchscript.pt from {I3D_ADDRESS}",
    "image": f"give inception-2015-12-05.pt from {INCEPTION_ADDRESS}",
    "classifier": "give a TorchScript that takes uint8 (N, 3, H, W) and returns logits (N, classes)",
}
Form = Literal["I3D", "Inception", "one input"]
"""What a TorchScript is, told by the arguments of its forward."""

T = TypeVar("T")


@dataclass(frozen=True)
class CheckedFile:
    """A network's file that is there and has the sha256 that was asked for; not opened yet.

    Attributes:
        path, sha256: of the file.
        role: what it is wanted for.
        device: where it is to compute.
    """

    path: Path
    sha256: str
    role: Role
    device: torch.device

    @classmethod
    def of(cls, file: NetworkFile, role: Role, device: str | torch.device) -> Self:
        """Check a file.

        Raises:
            InputError: missing, or of another sha256.
        """
        path = Path(file.path).expanduser()
        if not path.is_file():
            raise InputError(f"The {role} network {path} is not a file on this machine: {CURES[role]}.")
        sha256 = sha256_of(path)
        if file.sha256 is not None and file.sha256.strip().lower() != sha256:
            raise InputError(
                f"The {role} network {path} has sha256 {sha256} where {file.sha256} was asked for: download it again, "
                "or state its own."
            )
        return cls(path, sha256, role, torch.device(device))

    def refused(self, reason: str) -> InputError:
        """The error that says why the file is of no use for its role."""
        return InputError(f"The {self.role} network {self.path} {reason}: {CURES[self.role]}.")

    def script(self, *forms: Form) -> tuple[nn.Module, Form]:
        """The TorchScript of the file, and which of the forms it has.

        Raises:
            InputError: no TorchScript, or of another form.
        """
        try:
            script = torch.jit.load(self.path, map_location=self.device)
        except (RuntimeError, ValueError):
            raise self.refused("is no TorchScript") from None
        schema = getattr(script.forward, "schema", None)
        arguments = [] if schema is None else schema.arguments[1:]
        names = [argument.name for argument in arguments]
        form: Form | None = None
        if {"rescale", "resize", "return_features"} <= set(names):
            form = "I3D"
        elif {"return_features", "no_output_bias"} <= set(names):
            form = "Inception"
        elif len([argument for argument in arguments if not argument.has_default_value()]) == 1:
            form = "one input"
        if form not in forms:
            raise self.refused(f"is another kind of network, as its forward takes ({', '.join(names)})")
        return script.eval(), form

    def attempt(self, function: Callable[[], T]) -> T:
        """What a function that runs the network returns.

        Raises:
            InputError: the network cannot run.
        """
        try:
            return function()
        except Exception as error:  # whatever the code in the file does
            reason = str(error).strip().splitlines()[-1]
            raise self.refused(f"could not compute on an example ({reason})") from None

    def columns(self, network: Callable[[Tensor], object], example: Tensor) -> int:
        """How many numbers a network gives for the one video or picture of an example.

        Raises:
            InputError: the network cannot run, or gives anything else.
        """
        found = self.attempt(lambda: network(example))
        if not isinstance(found, Tensor) or found.dtype != torch.float32 or found.ndim != 2 or len(found) != 1:
            what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise self.refused(f"returns {what} where float32 (1, n) belongs")
        if not found.isfinite().all():
            raise self.refused("returns numbers that are not finite")
        return found.shape[1]
