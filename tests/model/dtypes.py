"""Record the precisions of a pass, to compare strategies."""

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gpdit_lightning import GPDiT

Dtypes = dict[str, set[str]]

MIXED_BF16: Dtypes = {
    "residual stream": {"float32"},
    "inputs of the stream's norms": {"float32"},
    "outputs of the stream's norms": {"float32"},
    "queries and keys after QK-norm": {"float32"},
    "inputs of products": {"bfloat16"},
    "outputs of products": {"bfloat16"},
    "velocity": {"float32"},
}
"""What `bf16-mixed` means under every strategy; the loss, recorded by runs only, is in float32."""


def record_dtypes(model: GPDiT) -> tuple[Dtypes, list[RemovableHandle]]:
    """Return a dictionary that collects the precisions of all later passes of a model, and the hooks that fill it."""
    dtypes: Dtypes = {}
    hooks: list[RemovableHandle] = []

    def add(name: str, tensor: Tensor) -> None:
        dtypes.setdefault(name, set()).add(str(tensor.dtype).removeprefix("torch."))

    def after(name_of_input: str, name_of_output: str, module: nn.Module) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if name_of_input:
                add(name_of_input, inputs[0])
            add(name_of_output, output)

        hooks.append(module.register_forward_hook(hook))

    for name, module in model.named_modules():
        if module in set(model.blocks):
            after("residual stream", "residual stream", module)
        elif name.endswith(("query_norm", "key_norm")):
            after("", "queries and keys after QK-norm", module)
        elif isinstance(module, nn.RMSNorm):
            after("inputs of the stream's norms", "outputs of the stream's norms", module)
        elif isinstance(module, nn.Linear):
            after("inputs of products", "outputs of products", module)
    after("", "velocity", model)
    return dtypes, hooks
