"""What is looked at during a run: the loss of held-out sets, and texts."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.generation.layout import laid_out
from llama_jax.generation.llama import Llama
from llama_jax.generation.request import Settings
from llama_jax.model import Params, merge_adapter, unstack_layers
from llama_jax.training.state import TrainState, evaluated
from train.setup import Run


class Evaluator:
    """Evaluates states; its programs are compiled at the first call that needs them."""

    def __init__(self, run: Run):
        self._run = run
        self._prompts = [line for line in run.recipe.eval.prompts.splitlines() if line]

    def __call__(self, state: TrainState) -> dict[str, Any]:
        """{NAME/loss, NAME/perplexity} of every held-out set: means in nats over all targets that count; and `samples`,
        [{prompt, text}], if there are prompts."""
        found: dict[str, Any] = {}
        for name, dataset in self._run.held_out.items():
            sums = [self._run.eval_step(state, batch) for batch in self._run.held_out_batches(dataset)]
            total, weight = (math.fsum(float(part[i]) for part in sums) for i in (0, 1))
            loss = total / max(weight, 1.0)
            found |= {f"{name}/loss": loss, f"{name}/perplexity": math.exp(min(loss, 700.0))}
        return found | ({"samples": self._samples(state)} if self._prompts else {})

    def _samples(self, state: TrainState) -> list[dict[str, str]]:
        """Greedy continuations, or answers where records are conversations."""
        run = self._run
        mesh = run.mesh if run.mesh.size > 1 else None
        model = Llama(
            run.cfg,
            laid_out(self._served(state), mesh),
            run.tokenizer,
            chat_format=run.chat_format,
            mesh=mesh,
            batch_size=len(self._prompts),
        )
        settings = Settings(temperature=0, max_new_tokens=run.recipe.eval.max_new_tokens)
        if run.chat_format:
            texts = [model.chat([{"role": "user", "content": prompt}], settings).text for prompt in self._prompts]
        else:
            texts = [completion.text for completion in model.generate(self._prompts, settings)]
        return [{"prompt": prompt, "text": text} for prompt, text in zip(self._prompts, texts, strict=True)]

    def _served(self, state: TrainState) -> Params:
        """Weights to sample with: a copy in the compute dtype, the adapter in them, layers a list."""
        run = self._run
        cast = functools.partial(jax.tree.map, lambda leaf: leaf.astype(jnp.dtype(run.step_config.dtype)))

        @jax.jit
        def served(state: TrainState) -> Params:
            params, adapter = evaluated(run.form, state)
            params = merge_adapter(run.cfg, params, adapter, run.form.lora) if adapter else params
            return cast(params if isinstance(params["layers"], list) else unstack_layers(params))

        return served(state)
