"""Bars of what takes a while, on stderr."""

import sys
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 60.0  # between two states of a bar in a log


def progress_bar(total: int, name: str, **options: Any) -> tqdm:
    """A bar that moves on a terminal; where stderr is none, a log has its beginning, a state each minute, and its end.

    Args:
        options: of tqdm.
    """
    pace = {} if sys.stderr.isatty() else {"mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS}
    return tqdm(total=total, desc=name, file=sys.stderr, **pace, **options)
