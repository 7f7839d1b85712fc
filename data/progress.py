"""
Progress bars: of a file that is downloaded or written, and of anything else.
"""
import os
import sys

from tqdm import tqdm


def bar_on_terminal(**options):
    """Returns a bar of tqdm, which takes the options, that shows nothing without a terminal."""
    # With None tqdm asks stderr whether it is one, and a process may have been started without.
    return tqdm(disable=True if sys.stderr is None else None, **options)


def progress_bar(path, n_bytes, initial=0):
    """Returns a progress bar in bytes, which shows only on a terminal; n_bytes may be None."""
    return bar_on_terminal(
        desc=os.path.basename(path),
        initial=initial,
        total=n_bytes,
        unit="B",
        unit_scale=True,
    )
