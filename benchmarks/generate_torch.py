"""What transformers and torch take to generate with TinyLlama-1.1B's shape; printed like infer.bench's lines.

    python benchmarks/generate_torch.py [--dtype bfloat16] [--batch 1 8] [--prompt 512] [--steps 16]

For an environment with torch and transformers, which this project does not install. Random weights, a growing cache, greedy.
"""

import argparse
import json
import statistics
import time

import torch
import transformers


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=16, help="timed, after two that are not")
    args = parser.parse_args()
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=2048, dtype=getattr(torch, args.dtype),
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, args.dtype)).eval()
    for batch in args.batch:
        tokens = torch.randint(0, 32000, (batch, args.prompt))
        model(tokens[:, :32])
        start = time.perf_counter()
        found = model(tokens, use_cache=True, logits_to_keep=1)
        first_token_seconds, seconds = time.perf_counter() - start, []
        token = found.logits[:, -1:].argmax(-1)
        for _ in range(args.steps + 2):
            start = time.perf_counter()
            found = model(token, past_key_values=found.past_key_values, use_cache=True)
            token = found.logits[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - start)
        step = statistics.median(seconds[2:])
        line = {"torch": torch.__version__, "dtype": args.dtype, "batch": batch, "first_token_seconds": first_token_seconds}
        line |= {"prefill_tokens_per_second": batch * args.prompt / first_token_seconds, "step_seconds": step}
        print(json.dumps(line | {"tokens_per_second": batch / step}), flush=True)


if __name__ == "__main__":
    main()
