"""What a user may name as the source of guesses (llama_jax.generation.speculation), checked against the model."""

from typing import Any

from jax.sharding import Mesh

from llama_jax.checkpoint.source import Source
from llama_jax.checkpoint.store import DTYPES, Checkpoint
from llama_jax.config import ModelConfig
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation.layout import load_laid_out
from llama_jax.generation.reading import Reader
from llama_jax.generation.speculation import DRAFT_TOKENS, LOOKUP_TOKENS, SLACK, Speculation
from llama_jax.mesh import MeshShape, why_illegal
from llama_jax.text.tokenizer import Tokenizer

LOOKUP = "lookup"
MOST_TOKENS = 15


def check_draft(draft: str, draft_tokens: int) -> None:
    """Raises LlamaError for settings that no model can honour."""
    if not 0 <= draft_tokens <= MOST_TOKENS:
        raise LlamaError(
            ExitCode.BAD_REQUEST,
            f"draft_tokens is {draft_tokens}, expected 1 to {MOST_TOKENS}, or 0 for {LOOKUP_TOKENS} looked up, "
            f"{DRAFT_TOKENS} of a model",
        )
    if draft_tokens and not draft:
        raise LlamaError(
            ExitCode.BAD_REQUEST,
            f"draft_tokens is {draft_tokens} and nothing guesses them: name a draft, {LOOKUP!r} or a model",
        )


def lookup(draft_tokens: int) -> Speculation:
    """Guesses from the text itself."""
    return Speculation(draft_tokens or LOOKUP_TOKENS)


def check_same_tokens(
    draft: ModelConfig, draft_tokenizer: Tokenizer | None, target: ModelConfig, tokenizer: Tokenizer | None
) -> None:
    """Raises LlamaError where a smaller model's tokens are not the target's."""
    if draft.vocab_size != target.vocab_size:
        raise LlamaError(
            ExitCode.VOCAB_MISMATCH,
            f"the draft has a vocabulary of {draft.vocab_size:,} tokens, the model {target.vocab_size:,}: it needs the same",
        )
    if draft_tokenizer and tokenizer and (differs := first_difference(draft_tokenizer, tokenizer)):
        raise LlamaError(ExitCode.VOCAB_MISMATCH, f"the draft's tokenizer is another one than the model's: {differs}")


def draft_model(
    opened: Checkpoint | Source, dtype: str, quantize: str, draft_tokens: int, *, mesh: Mesh | None, **options: Any
) -> Speculation:
    """Guesses of a smaller model, loaded beside the target.

    Args:
        options: of the Reader, as the target's.

    Raises:
        LlamaError: the mesh cannot hold it.
    """
    if mesh is not None:
        shape = MeshShape(**mesh.shape)
        if reason := why_illegal(opened.config, shape):
            raise LlamaError(
                ExitCode.BAD_MESH, f"the draft cannot be spread over {shape}: {reason}; choose a mesh that both allow"
            )
    params = load_laid_out(opened, DTYPES[dtype], mesh=mesh, quantize=quantize)
    return Speculation(draft_tokens or DRAFT_TOKENS, Reader(opened.config, params, mesh=mesh, slack=SLACK, **options))


def first_difference(a: Tokenizer, b: Tokenizer) -> str:
    """What makes a another tokenizer than b, of a: "it has ...", "token 5 is ..."; "" where they are the same."""
    if a.fingerprint and a.fingerprint == b.fingerprint:
        return ""
    if a.vocab_size != b.vocab_size:
        return f"it has {a.vocab_size:,} tokens instead of {b.vocab_size:,}"
    for i in range(a.vocab_size):
        if (one := a.decode([i], continued=True)) != (other := b.decode([i], continued=True)):
            return f"token {i} is {one!r} instead of {other!r}"
    return ""
