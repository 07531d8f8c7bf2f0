"""The model as EleutherAI's lm-evaluation-harness asks for one (lm_eval.api.model.TemplateLM).

It encodes and cuts text as the harness's own Hugging Face backend does, so that both get the same numbers (docs/evaluation.md
says where they differ); scoring.py and answering.py compute them.
"""

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import llama_jax
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.evaluation.answering import answers
from llama_jax.evaluation.arguments import check_model_args
from llama_jax.evaluation.encoding import encode, render_chat, template_of
from llama_jax.evaluation.scoring import log_likelihoods
from llama_jax.model import param_shapes
from llama_jax.progress import progress_bar

NAME = "llama_jax"


@register_model(NAME)
class HarnessModel(TemplateLM):
    """A checkpoint that lm-eval can ask.

    Args: llama_jax.evaluation.arguments.ModelArgs.
    """

    def __init__(self, **model_args: Any):
        super().__init__()
        self.args = args = check_model_args(model_args)
        self.batch_size = args.rows
        self.max_gen_toks = args.max_gen_toks
        self.llama = llama_jax.load(
            args.checkpoint,
            mesh=dict(data=args.data, fsdp=args.fsdp, tensor=args.tensor),
            dtype=args.dtype,
            quantize=args.quantize,
            max_length=args.max_length,
            tokenizer=args.tokenizer,
            batch_size=self.batch_size,
            adapter=args.adapter,
            draft=args.draft,
            draft_tokens=args.draft_tokens,
        )
        if self.llama.tokenizer is None:
            raise LlamaError(
                ExitCode.BAD_TOKENIZER, f"{args.checkpoint} has no tokenizer, and tasks are text: --model_args tokenizer=FILE"
            )
        if self.prefix_token_id is None:
            raise LlamaError(ExitCode.BAD_TOKENIZER, "the tokenizer has neither a beginning- nor an end-of-sequence token")

    @property
    def eot_token_id(self) -> int | None:
        return self.llama.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int | None:
        """What a text without context follows: BOS, or EOS where there is none."""
        tokenizer = self.llama.tokenizer
        return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id

    @property
    def max_length(self) -> int:
        return self.llama.max_length

    @property
    def tokenizer_name(self) -> str:
        """What the harness's caches of rendered prompts are told apart by."""
        return f"{self.llama.chat_format or 'base'}-{self.llama.tokenizer.fingerprint}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            return encode(self.llama.tokenizer, string, self.args.add_bos_token)
        return encode(self.llama.tokenizer, string, add_special_tokens, repeat_bos=True)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return template_of(self.llama) if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        return render_chat(self.llama, chat_history, opened=add_generation_prompt, now=datetime.datetime.now())

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        with progress_bar(len(requests), "log-likelihoods", disable=disable_tqdm) as bar:
            pairs = [(context, continuation) for _, context, continuation in requests]
            found = log_likelihoods(self.llama, pairs, self.batch_size, bar.update)
        for (texts, _, _), result in zip(requests, found, strict=True):
            if texts is not None:  # a window of loglikelihood_rolling
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = [(n, *pair) for n, request in enumerate(requests) for pair in self._windows(request.args[0])]
        found = self._loglikelihood_tokens([(None, *pair) for _, *pair in windows], disable_tqdm)
        totals = [0.0] * len(requests)
        for (n, *_), (logprob, _) in zip(windows, found, strict=True):
            totals[n] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        with progress_bar(len(requests), "answers", disable=disable_tqdm) as bar:
            pairs = [(self.tok_encode(context), arguments) for context, arguments in (r.args for r in requests)]
            found = answers(self.llama, pairs, self.batch_size, self.max_gen_toks, bar.update)
        for request, text in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results."""
        return {
            "model_num_parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(self.llama.config))),
            "model_dtype": str(self.llama.params["final_norm"].dtype),
            "model_sha": "",
            "model_revision": "",
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "jax": jax.__version__,
        }

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        tokens, prefix = self.tok_encode(text), self.prefix_token_id
        return map(make_disjoint_window, get_rolling_token_windows(tokens, prefix, self.max_length, context_len=1))
