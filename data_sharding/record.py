"""One labelled image, as every data set format is read into and as shards store it.

Shape letters: N objects, R regions, K key points of one object.
"""

from dataclasses import dataclass, field

import numpy as np

RECORD_VERSION = 1


def _empty(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


@dataclass(frozen=True)
class Category:
    """One class. Its label is its position in the data set's tuple of categories, not its id."""

    id: int
    """The id of the label file, the one that COCO results are written with."""
    name: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """One labelled image. Coordinates are pixels of the upright image (EXIF rotation applied)."""

    image_id: int
    """Unique within the split; the id that evaluation reports."""
    file_name: str
    """Path below the data set's image folder, for messages and pictures."""
    width: int
    height: int
    image: bytes
    """The image file as it was found (JPEG, PNG, ...), never re-encoded."""
    boxes: np.ndarray = field(default_factory=lambda: _empty(0, 4))
    """(N, 4) float32 as x1 y1 x2 y2, inside the image."""
    labels: np.ndarray = field(default_factory=lambda: _empty(0, dtype=np.int64))
    """(N,) int64 in [0, number of classes)."""
    annotation_ids: np.ndarray = field(default_factory=lambda: _empty(0, dtype=np.int64))
    """(N,) int64, the ids of the label file."""
    areas: np.ndarray = field(default_factory=lambda: _empty(0))
    """(N,) float32, px^2: the mask's area where the label file gives it, else the box's."""
    crowd: np.ndarray = field(default_factory=lambda: _empty(0, dtype=np.bool_))
    """(N,) bool: a crowd (COCO `iscrowd`, OpenImages group-of): ignored in losses, matched by IoA in evaluation."""
    difficult: np.ndarray = field(default_factory=lambda: _empty(0, dtype=np.bool_))
    """(N,) bool: Pascal VOC's flag: ignored in losses, and in evaluation, where it is matched by IoU as any object."""
    ignore_regions: np.ndarray = field(default_factory=lambda: _empty(0, 4))
    """(R, 4) float32 boxes of no class, in which nothing counts (VisDrone class 0, HIT-UAV DontCare)."""
    segmentations: tuple[str, ...] = ()
    """Per object the label file's polygons or RLE as JSON text, or empty when the set has none."""
    keypoints: np.ndarray | None = None
    """(N, K, 3) float32 as x y visibility, or None when the set has none."""

    def __post_init__(self) -> None:
        count = len(self.boxes)
        for name in ("labels", "annotation_ids", "areas", "crowd", "difficult"):
            if len(getattr(self, name)) != count:
                raise ValueError(f"{self.file_name}: {count} boxes but {len(getattr(self, name))} {name}")
