"""The step that transformers and torch take to train the 110M model of configs/train_bench.py; printed like train.bench's.

    python benchmarks/train_torch.py [--dtype float32] [--batch 8] [--length 512] [--steps 5]

For an environment with torch and transformers, which this project does not install. AdamW on float32 weights, gradients clipped
to norm 1, loss over all tokens, as in train.bench with one document a row; bfloat16 by autocast.
"""

import argparse
import json
import statistics
import time

import torch
import transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5, help="timed, after one that is not")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=1024, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, 32000, (args.batch, args.length + 1))
    seconds = []
    for _ in range(1 + args.steps):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    seconds = seconds[1:]
    print(
        json.dumps(
            {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "dtype": args.dtype,
                "model_parameters": sum(p.numel() for p in model.parameters()),
                "step_seconds": statistics.median(seconds),
                "step_seconds_least": min(seconds),
                "tokens_per_second": args.batch * args.length / statistics.median(seconds),
            }
        )
    )


if __name__ == "__main__":
    main()
