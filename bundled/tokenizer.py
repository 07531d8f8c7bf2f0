"""The bundled model's tokenizer: SentencePiece BPE trained on our own stories, with the settings of Llama 2's tokenizer."""

import io
from pathlib import Path

import sentencepiece

from bundled.stories import stories

VOCAB_SIZE = 1024
NUM_STORIES = 5000

# The trainer_spec and normalizer_spec found in Llama 2's tokenizer.model, where they differ from SentencePiece's defaults.
LLAMA2 = dict(
    model_type="bpe",
    character_coverage=0.99995,
    normalization_rule_name="identity",
    add_dummy_prefix=True,
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
    split_digits=True,
    byte_fallback=True,
    unk_id=0,
    bos_id=1,
    eos_id=2,
    pad_id=-1,
)


def train_tokenizer(output: Path, *, vocab_size: int, seed: int, num_stories: int = NUM_STORIES) -> None:
    """Writes a SentencePiece model file trained on the stories of `seed`; the same bytes on every run.

    SentencePiece takes one sentence a line and would never see a newline, so paragraphs come as lines of their own and the
    newline is one of the 256 byte pieces, as in Llama 2.

    Args:
        output: the file to write.
        vocab_size: pieces in all: 3 control pieces, 256 bytes, then letters and merges.
        seed: of the stories; SentencePiece itself draws nothing, as no sentence is left out.
        num_stories: how many stories to read.
    """
    paragraphs = (line for story in stories(num_stories, seed) for line in story.split("\n"))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=paragraphs,
        model_writer=model,
        vocab_size=vocab_size,
        num_threads=1,
        minloglevel=2,
        **LLAMA2,
    )
    output.write_bytes(model.getvalue())
