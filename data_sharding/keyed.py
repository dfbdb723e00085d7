"""Random numbers that are a function of a key: no state, nothing global, the same on every machine."""

import hashlib
import json

import numpy as np


def uniforms(*key: object, count: int) -> np.ndarray:
    """`count` float64 numbers in [0, 1) that follow from the parts of `key` as text: Philox keyed with SHA-256."""
    digest = hashlib.sha256(json.dumps([str(part) for part in key]).encode()).digest()
    # Raw words, for numpy promises that these stay the same in every version, unlike what Generator makes of them.
    raw = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
