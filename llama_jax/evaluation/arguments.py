"""What --model_args may say."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from llama_jax.errors import ExitCode, LlamaError

FROM_HARNESS = ("max_batch_size", "device", "trust_remote_code")  # what lm-eval passes by itself, and means torch


@dataclasses.dataclass(frozen=True)
class ModelArgs:
    """How the model is loaded and asked; what has no words here is as for llama_jax.load.

    Attributes:
        checkpoint: made by llama_jax.convert, a training run's WORKDIR, or Meta's or Hugging Face's folder.
        tokenizer: its file or folder, when the checkpoint has none.
        dtype: auto (as stored), bfloat16, float32, float16.
        quantize: int8, fp8, int4, w8a8.
        max_length: tokens of prompt and answer together; 0: the model's context.
        max_gen_toks: tokens of an answer where the task does not say.
        adapter: of a LoRA run, or PEFT's.
        draft, draft_tokens: guesses several tokens a step, for the same answers sooner.
        add_bos_token: whether texts begin with BOS; not given: as the tokenizer does it.
        data, fsdp, tensor: how the model is spread over the devices; data=8 runs eight copies.
        batch_size: sequences at once, or auto (16); the command's --batch_size.
    """

    checkpoint: str
    tokenizer: str = ""
    dtype: str = "auto"
    quantize: str = ""
    max_length: int = 0
    max_gen_toks: int = 256
    adapter: str = ""
    draft: str = ""
    draft_tokens: int = 0
    add_bos_token: bool | None = None
    data: int = 1
    fsdp: int = 1
    tensor: int = -1
    batch_size: int | str = "auto"

    def __post_init__(self):
        for name, kind in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
            if type(value) not in kinds:
                wanted = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
                raise LlamaError(ExitCode.BAD_REQUEST, f"--model_args {name}={value!r}: expected {wanted}")
        if self.max_gen_toks < 1:
            raise LlamaError(ExitCode.BAD_REQUEST, f"--model_args max_gen_toks={self.max_gen_toks}: expected at least 1")

    @property
    def rows(self) -> int:
        """The batch size in numbers."""
        text = str(self.batch_size)
        if text.split(":")[0] == "auto":
            return 16
        if not text.isdigit() or int(text) < 1:
            raise LlamaError(ExitCode.BAD_REQUEST, f"--batch_size {text}: expected auto or a number from 1")
        return int(text)


NAMES = [field.name for field in dataclasses.fields(ModelArgs)]


def check_model_args(given: Mapping[str, Any]) -> ModelArgs:
    """ModelArgs of what lm-eval parsed.

    Raises:
        LlamaError: a key is not known (the message has the nearest), a value is of the wrong kind, or there is no checkpoint.
    """
    given = {name: value for name, value in given.items() if name not in FROM_HARNESS}
    for name in given:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, 1, cutoff=0.5)
            meant = f"did you mean {near[0]}? It" if near else "it"
            raise LlamaError(ExitCode.BAD_REQUEST, f"--model_args has no {name}: {meant} has {', '.join(NAMES)}")
    if "checkpoint" not in given:
        raise LlamaError(ExitCode.BAD_REQUEST, "no checkpoint: --checkpoint DIR, or --model_args checkpoint=DIR")
    texts = ("checkpoint", "tokenizer", "adapter", "draft")  # a path that is a number arrives as one
    return ModelArgs(**{name: str(value) if name in texts else value for name, value in given.items()})
