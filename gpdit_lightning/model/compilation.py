"""Settings of torch.compile."""

from typing import Any

MANY_GRAPHS: dict[str, Any] = {"recompile_limit": 1024, "accumulated_recompile_limit": 1024}
"""For `torch._dynamo.config.patch`: a graph for each shape. Images and videos, clip lengths, numbers of contexts,
precisions and evaluation have more shapes than torch's limit of 8 graphs, beyond which it runs eagerly."""
