"""Memory of the host: what is freed stays with the process."""

from __future__ import annotations

import ctypes

# The numbers that <malloc.h> gives these settings.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_MOST = 2**31 - 1  # what an int holds
_MOST_OF_OLD = 32 * 2**20  # before glibc 2.35


def keep_freed_memory() -> bool:
    """Let glibc's allocator keep large blocks for the next tensor, where it would hand them back to
    the system and take every page anew, which large batches of a small network feel.

    The process then stays as large as it once was. Returns whether there was a glibc to be told.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False  # another C library, or another system
    is_set = bool(mallopt(_MMAP_THRESHOLD, _MOST)) or bool(mallopt(_MMAP_THRESHOLD, _MOST_OF_OLD))
    return is_set and bool(mallopt(_TRIM_THRESHOLD, _MOST))
