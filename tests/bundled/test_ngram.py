import numpy as np
import pytest

from bundled.make_data import records
from bundled.ngram import NGram
from bundled.tokenizer import VOCAB_SIZE


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
    rows, test = (
        [tokenizer.encode(record["text"], bos=True, eos=True) for record in records(split, "story", range(count))]
        for split, count in (("train", 900), ("held_out", 100))
    )
    perplexities = [NGram(rows, order, VOCAB_SIZE).perplexity(test) for order in (1, 2, 3)]
    assert perplexities == sorted(perplexities, reverse=True) and perplexities[-1] > 1
