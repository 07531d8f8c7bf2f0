import itertools

import numpy as np
import pytest
import sentencepiece

from bundled.data import held_out, padded, train_batch
from bundled.ngram import NGram
from bundled.stories import stories
from bundled.tokenizer import VOCAB_SIZE, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> sentencepiece.SentencePieceProcessor:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(path, vocab_size=VOCAB_SIZE, seed=0)
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_a_batch_depends_on_step_and_run_only(tokenizer):
    def batch(step, run=0):
        return train_batch(tokenizer, step, batch_size=4, length=256, run=run)

    assert batch(3).shape == (4, 257) and batch(3).dtype == np.int32
    assert np.array_equal(batch(3), batch(3))
    assert not np.array_equal(batch(3), batch(4)) and not np.array_equal(batch(3), batch(3, run=1))


def test_rows_are_whole_stories_and_a_cut_one(tokenizer):
    rows = train_batch(tokenizer, 0, batch_size=8, length=256)
    told = iter(stories(1000, 1_000_000))
    for row in rows:
        assert row[0] == tokenizer.bos_id()
        assert all(row[np.flatnonzero(row == tokenizer.eos_id())[:-1] + 1] == tokenizer.bos_id())
        *whole, cut = _split(row.tolist(), tokenizer.bos_id())
        for ids in whole:
            assert ids[-1] == tokenizer.eos_id() and tokenizer.decode(ids[:-1]) == next(told)
        assert next(told).startswith(tokenizer.decode([i for i in cut if i != tokenizer.eos_id()]))


def _split(ids: list[int], bos: int) -> list[list[int]]:
    starts = [i for i, token in enumerate(ids) if token == bos] + [len(ids)]
    return [ids[a + 1 : b] for a, b in itertools.pairwise(starts)]


def test_held_out_stories_fit_a_row_and_padding_is_not_scored(tokenizer):
    rows = held_out(tokenizer, 500)
    tokens, scored = padded(rows, 256)
    assert tokens.shape == (500, 257) and scored.shape == (500, 256)
    assert scored.sum() == sum(map(len, rows)) - 500
    assert all(tokens[i, 1:][scored[i]].tolist() == row[1:] for i, row in enumerate(rows))
    with pytest.raises(ValueError, match="tokens longer than 65"):
        padded(rows, 64)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngram_probabilities_sum_to_one(order):
    rows = np.random.default_rng(0).integers(2, 6, (20, 10)).tolist()
    model = NGram([[1, *row, 0] for row in rows], order, vocab_size=8)
    for context in ([1], [1, 2], [1, 3, 4], [1, 7, 7]):  # seen and never seen
        last = [model.log_probs([[*context, token]])[-1] for token in range(8)]
        assert np.exp(last).sum() == pytest.approx(1.0)


def test_ngram_matches_kneser_ney_by_hand():
    model = NGram([[1, 2, 3], [1, 2, 4], [1, 3, 3]], order=2, vocab_size=5)
    # Bigrams: 1-2 twice, 1-3, 2-3, 2-4, 3-3. Tokens 2, 3, 4 follow 1, 3 and 1 different tokens: 5 in all, 3 distinct.
    unigram_3 = (3 - 0.75 + 0.75 * 3 / 5) / 5
    expected = (1 - 0.75 + 0.75 * 2 * unigram_3) / 3  # after 1: three times in all, 2 or 3
    assert np.exp(model.log_probs([[1, 3]])[0]) == pytest.approx(expected)


def test_longer_contexts_predict_stories_better(tokenizer):
    rows, test = held_out(tokenizer, 1000)[:900], held_out(tokenizer, 1000)[900:]
    perplexities = [NGram(rows, order, VOCAB_SIZE).perplexity(test) for order in (1, 2, 3)]
    assert perplexities == sorted(perplexities, reverse=True) and perplexities[-1] > 1
