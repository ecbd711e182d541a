"""Progress bars: how far, and how long to go."""

import sys
from typing import Any

from tqdm import tqdm


def progress(description: str, total: int, unit: str, **options: Any) -> tqdm:
    """A progress bar with the time left; seldom redrawn where the output is not a terminal. Options are tqdm's."""
    options |= {"mininterval": 0.2 if sys.stderr.isatty() else 10, "dynamic_ncols": True, "smoothing": 0.1}
    return tqdm(total=total, desc=description, unit=unit, **options)
