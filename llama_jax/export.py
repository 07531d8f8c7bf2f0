"""A checkpoint of ours -> files that Hugging Face's transformers loads unchanged; an adapter -> files that its peft loads.

    python -m llama_jax.export --checkpoint checkpoints/llama-2-7b --output llama-2-7b-hf
    python -m llama_jax.export --checkpoint runs/lora --output llama-2-7b-lora
    python -m llama_jax.export --checkpoint runs/lora --merge --output llama-2-7b-tuned

Writes safetensors (with an index when there are several), config.json, generation_config.json and the tokenizer. Our weights
already have Hugging Face's orientation and RoPE convention, so that every tensor goes out byte for byte; quantised weights go
out as the floats that they stand for. Of a LoRA run the
adapter is written (adapter_model.safetensors, adapter_config.json, the tokenizer), or with --merge the model that it and its
base are together, in the base's dtype.
"""

import argparse
import sys

from llama_jax.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--output", required=True, help="directory to make")
    parser.add_argument("--merge", action="store_true", help="of a LoRA run: the adapted model instead of the adapter")
    parser.add_argument("--adapter", default="", help="added to the checkpoint: of a LoRA run, or a folder of PEFT's")
    parser.add_argument("--base-model", default="", help="of a LoRA run: the base's name, for adapter_config.json")
    args = parser.parse_args()
    from llama_jax.checkpoint.store import Checkpoint
    from llama_jax.commands.export import export, export_adapter
    from llama_jax.generation.load import open_weights

    checkpoint = Checkpoint.open(args.checkpoint)
    if checkpoint.adapter is not None and not args.merge and not args.adapter:
        export_adapter(checkpoint, args.output, args.base_model)
    elif args.adapter or checkpoint.adapter is not None:
        export(open_weights(args.checkpoint, args.adapter), args.output)
    else:
        export(checkpoint, args.output)
    print(f"wrote {args.output}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
