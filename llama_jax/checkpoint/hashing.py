"""Hashes of what a checkpoint was made from, computed while it is made."""

import concurrent.futures
import contextlib
import hashlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def hashing(files: Sequence[Path]) -> Iterator[concurrent.futures.Future]:
    """sha256 of the files, computed in a thread of its own; given up when the block is left with an error."""
    given_up = threading.Event()

    def digest(file: Path) -> str:
        sha256 = hashlib.sha256()
        with open(file, "rb") as opened:
            while not given_up.is_set() and (block := opened.read(2**24)):
                sha256.update(block)
        return sha256.hexdigest()

    def describe() -> list[dict[str, str | int]]:
        return [{"name": file.name, "bytes": file.stat().st_size, "sha256": digest(file)} for file in files]

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(describe)
        finally:
            given_up.set()
