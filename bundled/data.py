"""Stories as rows of token ids: fresh rows for every training step, and held-out stories one to a row."""

from collections.abc import Iterator, Sequence

import numpy as np
import sentencepiece

from bundled.stories import stories

TOKENIZER_SEED = 0
HELD_OUT_SEED = 1
FIRST_STEP_SEED = 1_000_000  # step s reads the stories of seed FIRST_STEP_SEED + s; below it seeds have other uses


def encode(tokenizer: sentencepiece.SentencePieceProcessor, texts: Iterator[str]) -> Iterator[list[int]]:
    """Each text as ids between BOS and EOS."""
    for text in texts:
        yield [tokenizer.bos_id(), *tokenizer.encode(text), tokenizer.eos_id()]


def train_batch(
    tokenizer: sentencepiece.SentencePieceProcessor, step: int, *, batch_size: int, length: int, run: int = 0
) -> np.ndarray:
    """The rows of one step, the same whenever it is asked for: a run resumes anywhere, and no story is read twice.

    Every row opens with a BOS, so that position 0 is trained as generation uses it; the next stories fill the row and the
    last of them is cut. There is no padding and so no mask.

    Args:
        tokenizer: of the bundled model.
        step: which step of the run.
        batch_size, length: B and T.
        run: another number, other stories.

    Returns:
        [B, T + 1] int32.
    """
    seed = FIRST_STEP_SEED * (run + 1) + step
    assert step < FIRST_STEP_SEED, "steps of this run would read the stories of the next"
    endless = encode(tokenizer, stories(batch_size * (length + 1), seed))
    rows = np.empty((batch_size, length + 1), np.int32)
    for row in rows:
        ids: list[int] = []
        while len(ids) <= length:
            ids += next(endless)
        row[:] = ids[: length + 1]
    return rows


def held_out(tokenizer: sentencepiece.SentencePieceProcessor, count: int) -> list[list[int]]:
    """Stories that no training step reads, each whole, with BOS and EOS."""
    return list(encode(tokenizer, stories(count, HELD_OUT_SEED)))


def padded(rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one story each and the positions to score.

    Returns:
        [B, T + 1] int32, filled up with zeros, and [B, T] bool: True where the next token belongs to the story.
    """
    too_long = max(map(len, rows)) - (length + 1)
    if too_long > 0:
        raise ValueError(f"a story is {too_long} tokens longer than {length + 1}: raise the length or shorten the plots")
    tokens = np.zeros((len(rows), length + 1), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return tokens, np.arange(length) < np.array([[len(ids) - 1] for ids in rows])
