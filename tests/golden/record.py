"""Records logits.npz with transformers and torch; run it from the checkout where both are installed (not in CI):

python -m tests.golden.record
"""

import contextlib
import unittest.mock

import numpy as np
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.golden.models import CASES, PROMPT, RECORDED, Case, checksum, weights


class Float64Rope(torch.nn.Module):
    """LlamaRotaryEmbedding with the frequencies of transformers' own functions and the angles in float64."""

    def __init__(self, config: transformers.LlamaConfig):
        super().__init__()
        compute = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]]
        with contextlib.ExitStack() as stack:
            for name in ("float", "float32"):  # the functions say torch.float and torch.float32
                stack.enter_context(unittest.mock.patch.object(torch, name, torch.float64))
            self.freqs, self.factor = compute(config)
        assert self.freqs.dtype == torch.float64

    def forward(self, x, position_ids):
        angles = position_ids[..., None].double() * self.freqs
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.factor).to(x.dtype), (angles.sin() * self.factor).to(x.dtype)


def build(case: Case) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig.from_dict(dict(case.config_json))
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config).float().eval()
    missing, unexpected = model.load_state_dict({k: torch.from_numpy(v) for k, v in weights(case).items()}, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if config.tie_word_embeddings else []), (missing, unexpected)
    model.tie_weights()
    if case.exact_angles:
        model.model.rotary_emb = Float64Rope(model.config)
    return model


@torch.no_grad()
def logits(model: transformers.LlamaForCausalLM, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[T, V] float32. The mask of ones keeps transformers from reading a jump in the positions as a second sequence."""
    ids, places = (torch.from_numpy(a.astype(np.int64))[None] for a in (tokens, positions))
    return model(ids, position_ids=places, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].numpy()


def greedy(model: transformers.LlamaForCausalLM, prompt: np.ndarray, n: int) -> tuple[np.ndarray, float]:
    """n tokens, each from a forward pass over all before it; and the smallest lead of a token over the next best."""
    tokens, lead = prompt, np.inf
    for _ in range(n):
        last = logits(model, tokens, np.arange(len(tokens)))[-1]
        first, second = np.argsort(last)[[-1, -2]]
        lead = min(lead, float(last[first] - last[second]))
        tokens = np.append(tokens, first)
    return tokens[len(prompt) :].astype(np.int32), lead


def main():
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    arrays = {}
    for name, case in CASES.items():
        model = build(case)
        arrays[name] = logits(model, case.tokens, case.positions)
        arrays[f"{name}.crc32"] = np.uint32(checksum(weights(case)))
        note = f"{name}: logits of deviation {arrays[name].std():.2f}, largest {np.abs(arrays[name]).max():.2f}"
        if case.greedy:
            arrays[f"{name}.greedy"], lead = greedy(model, case.tokens[:PROMPT], case.greedy)
            assert lead > 1e-2, f"{name}: two tokens are {lead} apart; take another seed"
            note += f"; greedy {arrays[f'{name}.greedy'].tolist()}, smallest lead {lead:.3f}"
        print(note)
    np.savez_compressed(RECORDED, **arrays)
    print(f"{RECORDED}: {RECORDED.stat().st_size:,} bytes; torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
