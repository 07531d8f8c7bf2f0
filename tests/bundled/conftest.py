import pytest

from bundled.make_data import tokenizer_texts
from bundled.tokenizer import train_tokenizer
from llama_jax.text.spm import SentencePieceTokenizer


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """What the tokenizer is trained on."""
    return list(tokenizer_texts())


@pytest.fixture(scope="session")
def tokenizer_file(texts) -> bytes:
    return train_tokenizer(texts)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(tokenizer_file)
