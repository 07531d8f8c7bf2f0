"""llama2.c's tokenizer.bin -> the SentencePiece model it was made from.

The file is uint32 max_token_length, then for each token float32 score, int32 length and the bytes, with ▁ written as a space
and `<s>`, `</s>` with line ends around them (karpathy/llama2.c, tokenizer.py). Types are not stored, but the ids tell them.
"""

import struct

from llama_jax.errors import ExitCode, LlamaError
from llama_jax.text.spm import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN


def llama2c_to_proto(data: bytes) -> bytes:
    """The serialized SentencePiece model: id 0 unknown, 1 and 2 control, 3..258 bytes, the rest normal pieces."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    for i, (score, text) in enumerate(read_tokens(data)):
        if i < 3:
            model.pieces.add(piece=("<unk>", "<s>", "</s>")[i], score=0.0, type=(UNKNOWN, CONTROL, CONTROL)[i])
        elif i < 259 and text == f"<0x{i - 3:02X}>":
            model.pieces.add(piece=text, score=0.0, type=BYTE)
        else:
            model.pieces.add(piece=text.replace(" ", SPACE), score=score, type=NORMAL)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(model.pieces)
    trainer.byte_fallback = sum(p.type == BYTE for p in model.pieces) == 256
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = True
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model.SerializeToString()


def read_tokens(data: bytes) -> list[tuple[float, str]]:
    """(score, text) of each token; ExitCode.BAD_TOKENIZER when the bytes are something else or end early."""
    tokens, at = [], 4
    longest = struct.unpack_from("<I", data)[0] if len(data) >= 4 else 0
    while at < len(data):
        if at + 8 > len(data):
            raise _bad(f"ends inside token {len(tokens)}")
        score, length = struct.unpack_from("<fi", data, at)
        text = data[at + 8 : at + 8 + max(length, 0)]
        if not 0 < length <= max(longest, 16) or len(text) < length:  # the control tokens' line ends are not counted
            raise _bad(f"token {len(tokens)} is said to have {length} bytes, the longest of all {longest}")
        try:
            tokens.append((score, text.decode()))
        except UnicodeDecodeError as e:
            raise _bad(f"token {len(tokens)} is not UTF-8") from e
        at += 8 + length
    if len(tokens) < 4 or tokens[1][1].strip() != "<s>" or tokens[2][1].strip() != "</s>":
        raise _bad("tokens 1 and 2 are not <s> and </s>")
    return tokens


def _bad(what: str) -> LlamaError:
    return LlamaError(ExitCode.BAD_TOKENIZER, f"no llama2.c tokenizer.bin, or a cut one ({what}): give the file from llama2.c")
