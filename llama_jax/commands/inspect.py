"""What a checkpoint is."""

import dataclasses

import jax

from llama_jax.checkpoint.adapter import lora_config
from llama_jax.checkpoint.quantized import stored_bytes
from llama_jax.checkpoint.store import Checkpoint
from llama_jax.config import PRESETS
from llama_jax.model import adapter_shapes


def describe(checkpoint: Checkpoint) -> str:
    """Lines of text: path, model, source, and what made it."""
    config, source = checkpoint.config, checkpoint.source
    same = [name for name, preset in PRESETS.items() if preset == config]
    lines = [
        f"checkpoint   {checkpoint.path}",
        *_parameters(checkpoint),
        f"published as {', '.join(same) or '-'}",
        f"chat format  {checkpoint.chat_format or '- (a base model)'}",
        f"tokenizer    {', '.join(checkpoint.tokenizer) or '-'}",
        f"source       {source.get('kind', '-')} {source.get('path', '')}".rstrip(),
        *(f"  {f['name']}  {f['bytes']:,} bytes  sha256 {f['sha256']}" for f in source.get("files", ())),
        f"made by      {checkpoint.command}",
        "config",
        *(f"  {name:24}{value}" for name, value in dataclasses.asdict(config).items()),
    ]
    return "\n".join(lines)


def _parameters(checkpoint: Checkpoint) -> list[str]:
    """Of a model; or what an adapter is, and of which base."""
    num_params = checkpoint.config.num_params
    if checkpoint.adapter is None:
        size = stored_bytes(checkpoint)
        if not checkpoint.quantize:
            return [f"parameters   {num_params:,} in {checkpoint.dtype}, {size / 1e9:.2f} GB"]
        head = "" if checkpoint.config.tied_head else " and head"
        return [
            f"parameters   {num_params:,}, {size / 1e9:.2f} GB ({size:,} bytes)",
            f"quantised    {checkpoint.quantize}: projections{head}; the rest {checkpoint.dtype}",
        ]
    lora = lora_config(checkpoint)
    kind = ("DoRA" if lora.dora else "LoRA") + (", rank-stabilised" if lora.rslora else "")
    size = sum(leaf.size for leaf in jax.tree.leaves(adapter_shapes(checkpoint.config, lora, scan=True)))
    return [
        f"adapter      {kind}, rank {lora.rank}, alpha {lora.alpha:g}, of {', '.join(lora.targets)}",
        f"parameters   {size:,} in {checkpoint.dtype}, beside the {num_params:,} of its base",
        f"base         {checkpoint.adapter['base']}",
    ]
