"""
Show how much of a file has been downloaded or written.
"""
import os

from tqdm import tqdm


def progress_bar(path, n_bytes, initial=0):
    """Returns a progress bar in bytes, which shows only on a terminal; n_bytes may be None."""
    return tqdm(
        desc=os.path.basename(path),
        initial=initial,
        total=n_bytes,
        unit="B",
        unit_scale=True,
        disable=None,
    )
