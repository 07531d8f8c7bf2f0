"""What a user may name as the source of guesses (llama_jax.generation.speculation), checked against the model."""

from jax.sharding import Mesh

from llama_jax.checkpoint.load import load_params
from llama_jax.checkpoint.source import Source
from llama_jax.checkpoint.store import DTYPES, Checkpoint
from llama_jax.config import ModelConfig
from llama_jax.errors import ExitCode, LlamaError
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


def draft_model(
    opened: Checkpoint | Source,
    tokenizer: Tokenizer | None,
    *,
    target: ModelConfig,
    target_tokenizer: Tokenizer | None,
    dtype: str,
    mesh: Mesh | None,
    quantize: str,
    max_length: int,
    kernels: bool,
    cache_dtype: str,
    draft_tokens: int,
) -> Speculation:
    """Guesses of a smaller model, loaded beside the target.

    Args:
        opened: its weights; tokenizer: its own.
        the others: as they were resolved for the target.

    Raises:
        LlamaError: its tokens are not the target's, or the mesh cannot hold it.
    """
    cfg = opened.config
    if cfg.vocab_size != target.vocab_size:
        raise LlamaError(
            ExitCode.VOCAB_MISMATCH,
            f"the draft has a vocabulary of {cfg.vocab_size:,} tokens, the model {target.vocab_size:,}: a draft needs the same",
        )
    if tokenizer and target_tokenizer and (differs := _first_difference(tokenizer, target_tokenizer)):
        raise LlamaError(ExitCode.VOCAB_MISMATCH, f"the draft's tokenizer is another one than the model's: {differs}")
    if mesh is not None:
        shape = MeshShape(**mesh.shape)
        if reason := why_illegal(cfg, shape):
            raise LlamaError(
                ExitCode.BAD_MESH, f"the draft cannot be spread over {shape}: {reason}; choose a mesh that both allow"
            )
    params = load_params(opened, DTYPES[dtype], mesh=mesh, quantize=quantize)
    num_draft = draft_tokens or DRAFT_TOKENS
    options = dict(kernels=kernels, slack=SLACK, cache_dtype=cache_dtype)
    return Speculation(num_draft, Reader(cfg, params, max_length, mesh, **options))


def _first_difference(a: Tokenizer, b: Tokenizer) -> str:
    if a.fingerprint and a.fingerprint == b.fingerprint:
        return ""
    if a.vocab_size != b.vocab_size:
        return f"it has {a.vocab_size:,} tokens instead of {b.vocab_size:,}"
    for i in range(a.vocab_size):
        if (one := a.decode([i], continued=True)) != (other := b.decode([i], continued=True)):
            return f"token {i} is {one!r} instead of {other!r}"
    return ""
