"""What torch.compile makes of the same on the same card: python benchmarks/gpu_torch.py [BATCH...]

transformers' Llama of 7B's shape, random bfloat16 weights, a static cache at context 512, the step compiled as one CUDA graph
(mode "reduce-overhead"); then a prompt of 2,048 tokens, uncompiled, with torch's own attention.
"""

import json
import os
import statistics
import sys
import time

import torch
import transformers

CONTEXT, SLOTS, STEPS = 512, 1024, 64
LAYERS = int(os.environ.get("LAYERS", 32))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def main() -> None:
    width, hidden, heads = (4096, 11008, 32) if DEVICE == "cuda" else (256, 512, 4)
    cfg = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=hidden, num_hidden_layers=LAYERS, num_attention_heads=heads, vocab_size=32000,
        max_position_embeddings=4096, rms_norm_eps=1e-5, attn_implementation="sdpa", dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(cfg)
    model = model.to(torch.bfloat16).to_empty(device=DEVICE).eval()
    for weight in model.parameters():
        weight.normal_(0, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(cfg).to(DEVICE)
    step = torch.compile(
        lambda token, cache, at: model(token, past_key_values=cache, position_ids=at).logits[:, -1].argmax(-1),
        mode="reduce-overhead",
        fullgraph=True,
    )
    for batch in map(int, sys.argv[1:] or ["1"]):
        cache = transformers.StaticCache(config=cfg, max_cache_len=SLOTS)
        tokens = torch.ones((batch, CONTEXT), dtype=torch.long, device=DEVICE)
        model(tokens, past_key_values=cache, logits_to_keep=1)
        token, found = tokens[:, :1], []
        for i in range(STEPS + 8):
            at = torch.full((batch, 1), CONTEXT + i, dtype=torch.long, device=DEVICE)
            synchronise()
            start = time.perf_counter()
            token = step(token, cache, at)[:, None].clone()
            synchronise()
            found.append(time.perf_counter() - start)
        seconds = statistics.median(found[8:])
        print(
            json.dumps(
                {
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "batch": batch,
                    "ms": 1e3 * seconds,
                    "least": 1e3 * min(found),
                    "tokens_per_second": batch / seconds,
                    "first": found[0],
                }
            ),
            flush=True,
        )
    tokens, found = torch.ones((1, 2048), dtype=torch.long, device=DEVICE), []
    for _ in range(5):
        synchronise()
        start = time.perf_counter()
        model(tokens, logits_to_keep=1)
        synchronise()
        found.append(time.perf_counter() - start)
    print(json.dumps({"prefill": 2048, "ms": 1e3 * min(found)}))


if __name__ == "__main__":
    main()
