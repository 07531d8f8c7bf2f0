"""The one error a user can cause, and the exit code each cause has.

Everything that checks what comes from outside (a folder, a config, a prompt) raises `LlamaError`; its text says what came,
what was expected and what to do. Programs print it on one line and exit with its code. Anything else that escapes is a bug.
"""

import enum
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class ExitCode(enum.IntEnum):
    """Exit codes of the commands, one per cause; 1 is an unexpected failure and 2 a wrong command line."""

    BAD_REQUEST = 3  # a prompt, a sampling setting or an option that cannot be honoured
    NO_WEIGHTS = 10  # the folder is empty or holds no weights we know
    MISSING_SHARD = 11
    EXTRA_SHARD = 12
    WRONG_SHAPE = 13
    MISSING_TENSOR = 14
    UNKNOWN_TENSOR = 15
    NOT_FINITE = 16  # NaN or infinite weights
    UNSAFE_PICKLE = 17  # a pickle that would call something
    UNSAFE_NAME = 18  # an archive or index entry that points outside its folder
    BAD_OFFSET = 19  # data said to lie outside the file
    BAD_HEADER = 20  # a header that is larger than its file, or is not what the format says
    OLD_TORCH = 21  # torch's format from before version 1.6
    LFS_POINTER = 22  # a git-lfs pointer instead of the file
    TRUNCATED = 23
    BAD_CONFIG = 24  # a config we cannot honour: an attribute that changes the mathematics, a missing field
    BAD_TOKENIZER = 25
    VOCAB_MISMATCH = 26  # tokenizer and embedding disagree
    OUTPUT_EXISTS = 27
    DISK_FULL = 28
    NOT_A_CHECKPOINT = 29  # no complete llama_jax checkpoint there
    NOT_EQUAL = 30  # verify: the checkpoint does not compute what its source computes
    BAD_MESH = 31  # a mesh that the model or the devices do not allow
    UNKNOWN_TOPOLOGY = 32  # plan: no such accelerator or slice
    DOES_NOT_FIT = 33  # plan: no mesh of the slice has the memory
    NO_COORDINATOR = 34  # several processes: not all of them came
    PEER_DIED = 35  # several processes: another one ended
    NO_DATA = 36  # training data that is not there, or is empty
    BAD_RECORD = 37  # a record of the training data that cannot be used
    STOPPED = 38  # training: SIGTERM came, all is saved
    NOT_FINITE_STEP = 39  # training: a loss or gradient that is no number
    INTERRUPTED = 130


class LlamaError(Exception):
    """Something a user gave cannot be used."""

    def __init__(self, code: ExitCode, message: str):
        super().__init__(message)
        self.code = code

    def __reduce__(self):  # to be raised in a worker process and arrive whole
        return LlamaError, (self.code, str(self))


def run_command(main: Callable[[], None]) -> NoReturn:
    """Runs a program's main and exits: an error of the user's is one line on stderr and its own exit code."""
    try:
        main()
    except LlamaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(ExitCode.INTERRUPTED)
    except BrokenPipeError:  # the reader of stdout left: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)
