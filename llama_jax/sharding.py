"""The one table from logical axis to mesh axis.

Every parameter, cache and batch array names its axes; where an axis lies on the mesh `("data", "fsdp", "tensor")` is decided
here and nowhere else. The checkpoint cuts its chunks along the same axes, so that a device reads little more than its part.
"""

from jax.sharding import PartitionSpec

RULES: dict[str, str | tuple[str, ...] | None] = {  # None: whole on every device
    "batch": ("data", "fsdp"),
    "embed": "fsdp",  # weights are gathered layer by layer
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "head_dim": None,
    "norm": None,
    "length": None,
    "cache_length": None,
}


def spec(*names: str | None) -> PartitionSpec:
    """PartitionSpec of an array whose axes carry these logical names.

    Raises:
        ValueError: a name has no row in RULES.
    """
    unknown = [name for name in names if name is not None and name not in RULES]
    if unknown:
        raise ValueError(f"unknown logical axes {unknown} in {names}; known: {sorted(RULES)}. Add a row to RULES.")
    return PartitionSpec(*(None if name is None else RULES[name] for name in names))
