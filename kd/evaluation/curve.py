"""The area under a precision-recall curve, as VOC since 2010 and VisDrone take it."""

import numpy as np


def area(right: np.ndarray, objects: int) -> float:
    """The area under the envelope of precision over recall: (D,) bool hits by falling score, and how many objects there
    are to find (at least 1)."""
    hits = np.cumsum(right)
    recall = np.concatenate([[0.0], hits / objects, [1.0]])
    precision = np.concatenate([[0.0], hits / np.arange(1, len(right) + 1), [0.0]])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall) * envelope[1:]).sum())
