"""The random weights with which a backbone begins, one tensor after the other.

Xavier weights, zero biases, a zero output layer (as DiT), and branches scaled by 1 / sqrt(2 layers). The modulations
are zero (adaLN-Zero). The embedding of theta is as in DiT, but zero if it is added to tokens.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

BRANCH_OUTPUTS = ("attention_output.weight", "mlp.down.weight")
DEVIATION = 0.02  # of the embeddings of theta and of labels, as DiT's


def initial_weights(model: nn.Module, layers: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the initial value of each parameter by its name; a later value of the same name replaces an earlier one.

    Random numbers are drawn in a fixed order from torch's global generator of the device: that of the parameters or,
    for a model on the meta device, the default device.

    Args:
        model: a `GPDiT`.
        layers: number of its blocks.
    """
    scale = (2 * layers) ** -0.5
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(name, recurse=False):
            values = _empty_like(parameter)
            if isinstance(module, nn.Embedding):
                nn.init.normal_(values, std=DEVIATION)
            elif isinstance(module, nn.Linear) and values.ndim == 2:
                nn.init.xavier_uniform_(values)
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(values)
            else:
                nn.init.ones_(values)  # norms
            if key in ("output.weight", "output_modulation.weight") or key.endswith(".modulation.weight"):
                nn.init.zeros_(values)
            elif key.endswith(BRANCH_OUTPUTS):
                values.mul_(scale)
            yield key, values
    parameters = dict(model.named_parameters())
    for key in ("time_embedding.hidden.weight", "time_embedding.output.weight"):
        if key in parameters:
            values = nn.init.normal_(_empty_like(parameters[key]), std=DEVIATION)
            is_last = key == "time_embedding.output.weight" and "output_modulation.weight" not in parameters
            yield key, nn.init.zeros_(values) if is_last else values


def weights_of_new(model: nn.Module, layers: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that a model on the meta device would have without this device, as of `initial_weights`."""
    for module in model.modules():  # the constructors of torch draw weights too, which are replaced
        if isinstance(module, nn.Linear):
            nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        elif isinstance(module, nn.Embedding):
            nn.Embedding(module.num_embeddings, module.embedding_dim)
    yield from initial_weights(model, layers)


def _empty_like(parameter: Tensor) -> Tensor:
    device = torch.get_default_device() if parameter.is_meta else parameter.device
    return torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
