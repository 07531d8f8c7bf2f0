"""Trains the bundled model on stories this repository writes: python -m bundled.train --output bundled/checkpoint

Prints the perplexity of held-out stories beside those of a trigram and a 5-gram model of as many stories.
"""

import argparse
import functools
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece
from etils import epath
from jax import Array

from bundled.data import FIRST_STEP_SEED, TOKENIZER_SEED, encode, held_out, padded, train_batch
from bundled.ngram import NGram
from bundled.stories import stories
from bundled.tokenizer import VOCAB_SIZE, train_tokenizer
from llama_jax.checkpoint.save import Leaf, save_checkpoint
from llama_jax.checkpoint.store import Checkpoint
from llama_jax.config import ModelConfig
from llama_jax.model import forward, init_params

LENGTH = 512
CONFIG = ModelConfig(
    vocab_size=VOCAB_SIZE,
    embed_dim=128,
    num_layers=5,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    mlp_dim=256,
    max_length=LENGTH,
    norm_eps=1e-5,
    rope_theta=1e4,
    tied_head=True,
)
HELD_OUT_STORIES, NGRAM_STORIES = 500, 20_000

Params = Mapping[str, Any]
Forward = Callable[[ModelConfig, Params, Array], Array]


def token_losses(forward: Forward, cfg: ModelConfig, params: Params, rows: Array) -> Array:
    """Cross entropy in nats of every token after the first: [B, T + 1] -> [B, T] float32."""
    logits = forward(cfg, params, rows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])


def make_optimizer(steps: int, peak_lr: float, warmup_steps: int) -> optax.GradientTransformation:
    """AdamW as in Llama 2 (arXiv:2307.09288, section 2.2): cosine to a tenth, decay 0.1 on matrices, norm clipped to 1."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak_lr, warmup_steps, steps, end_value=peak_lr / 10)
    decayed = functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=decayed)
    )


def make_train_step(forward: Forward, cfg: ModelConfig, optimizer: optax.GradientTransformation):
    """Returns step(params, opt_state, rows) -> (params, opt_state, loss): compiled once, reusing the old state's memory."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, opt_state: optax.OptState, rows: Array):
        loss, grads = jax.value_and_grad(lambda params: token_losses(forward, cfg, params, rows).mean())(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def perplexity(forward: Forward, cfg: ModelConfig, params: Params, rows: list[list[int]], length: int) -> float:
    """Per token of whole stories, one to a row, BOS given and EOS counted."""
    losses_of = jax.jit(functools.partial(token_losses, forward, cfg))
    total, count = 0.0, 0
    for start in range(0, len(rows), 50):
        tokens, scored = padded(rows[start : start + 50], length)
        total += float(jnp.sum(losses_of(params, jnp.asarray(tokens)), where=jnp.asarray(scored)))
        count += int(scored.sum())
    return float(np.exp(total / count))


def train(
    tokenizer: sentencepiece.SentencePieceProcessor, steps: int, batch_size: int, peak_lr: float, log_every: int
) -> Params:
    """Runs all the steps and returns the parameters."""
    optimizer = make_optimizer(steps, peak_lr, warmup_steps=min(100, steps // 10))
    step_fn = make_train_step(forward, CONFIG, optimizer)
    params = init_params(CONFIG, jax.random.key(0), jnp.float32)
    opt_state = optimizer.init(params)
    began = time.perf_counter()
    for step in range(steps):
        rows = train_batch(tokenizer, step, batch_size=batch_size, length=LENGTH)
        params, opt_state, loss = step_fn(params, opt_state, rows)
        if (step + 1) % log_every == 0:
            step_seconds = (time.perf_counter() - began) / (step + 1)
            print(f"step {step + 1}/{steps}  loss {float(loss):.3f}  {step_seconds:.2f} s/step", flush=True)
    return params


def save(output: Path, params: Params, tokenizer_file: Path, overwrite: bool) -> None:
    """Writes the checkpoint, in the dtype of the parameters."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="."): Leaf(
            leaf.shape, leaf.dtype, functools.partial(np.asarray, leaf)
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    checkpoint = Checkpoint(
        path=epath.Path(output),
        config=CONFIG,
        dtype=params["embedding"].dtype,
        chat_format="",
        tokenizer=(tokenizer_file.name,),
        source={"kind": "trained", "path": "bundled/train.py on bundled/stories.py", "files": []},
        command=shlex.join(["python", "-m", "bundled.train", *sys.argv[1:]]),
    )
    save_checkpoint(checkpoint, leaves, tokenizer_files=[tokenizer_file], overwrite=overwrite)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="checkpoint directory to make")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--peak-lr", type=float, default=3e-3)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        model_file = Path(scratch) / "tokenizer.model"
        train_tokenizer(model_file, vocab_size=VOCAB_SIZE, seed=TOKENIZER_SEED)
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        print(f"{CONFIG.num_params:,} parameters, {args.batch_size * LENGTH:,} tokens a step")
        params = train(tokenizer, args.steps, args.batch_size, args.peak_lr, args.log_every)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        save(args.output, params, model_file, args.overwrite)
    report(tokenizer, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))


def report(tokenizer: sentencepiece.SentencePieceProcessor, params: Params) -> None:
    """Prints perplexities of held-out stories: n-grams of as many stories, and the model."""
    test = held_out(tokenizer, HELD_OUT_STORIES)
    seen = list(encode(tokenizer, stories(NGRAM_STORIES, FIRST_STEP_SEED - 1)))
    print(f"held-out perplexity per token ({sum(map(len, test)) - len(test):,} tokens of {len(test)} stories):")
    for order in (3, 5):
        print(f"  {order}-gram  {NGram(seen, order, VOCAB_SIZE).perplexity(test):.3f}")
    print(f"  model   {perplexity(forward, CONFIG, params, test, LENGTH):.3f}")


if __name__ == "__main__":
    main()
