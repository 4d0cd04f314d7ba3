"""A model's whole past as a thing to keep: copied in no time, saved in a file of constant size, continued later.

snapshot.py copies caches, reading.py moves them on over text, fingerprint.py says which model they belong to,
file.py is the format, store.py the folder of named states.
"""

from .file import State, StateInfo, load_state, read_info, save_state
from .fingerprint import fingerprint
from .snapshot import cache_bytes, snapshot

__all__ = [
    "State",
    "StateInfo",
    "cache_bytes",
    "fingerprint",
    "load_state",
    "read_info",
    "save_state",
    "snapshot",
]
