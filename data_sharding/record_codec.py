"""A Record as one Arrow record batch, and back."""

import numpy as np
import pyarrow as pa

from data_sharding.record import RECORD_VERSION, Record

SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("file_name", pa.utf8(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("image", pa.large_binary(), nullable=False),
        pa.field("boxes", pa.list_(pa.float32()), nullable=False),
        pa.field("labels", pa.list_(pa.int64()), nullable=False),
        pa.field("annotation_ids", pa.list_(pa.int64()), nullable=False),
        pa.field("areas", pa.list_(pa.float32()), nullable=False),
        pa.field("crowd", pa.list_(pa.bool_()), nullable=False),
        pa.field("difficult", pa.list_(pa.bool_()), nullable=False),
        pa.field("ignore_regions", pa.list_(pa.float32()), nullable=False),
        pa.field("segmentations", pa.list_(pa.utf8()), nullable=False),
        pa.field("keypoints", pa.list_(pa.float32())),
        pa.field("keypoints_per_object", pa.int32()),
    ],
    metadata={"format": "minnow record", "version": str(RECORD_VERSION)},
)
"""Every field of a Record. Boxes and key points are flat; `keypoints` is null where the data set has none."""

_ARRAYS = {
    "boxes": np.float32,
    "labels": np.int64,
    "annotation_ids": np.int64,
    "areas": np.float32,
    "crowd": np.bool_,
    "difficult": np.bool_,
    "ignore_regions": np.float32,
}


def encode(record: Record) -> pa.RecordBatch:
    """One row. The bytes it is serialised to are a function of the record alone."""
    keypoints = record.keypoints
    values: dict[str, object] = {
        "image_id": record.image_id,
        "file_name": record.file_name,
        "width": record.width,
        "height": record.height,
        "image": record.image,
        "segmentations": list(record.segmentations),
        "keypoints": None if keypoints is None else np.asarray(keypoints, np.float32).ravel(),
        "keypoints_per_object": None if keypoints is None else keypoints.shape[1],
    }
    values |= {name: np.asarray(getattr(record, name), dtype).ravel() for name, dtype in _ARRAYS.items()}
    return pa.record_batch([pa.array([values[f.name]], f.type) for f in SCHEMA], schema=SCHEMA)


def decode(batch: pa.RecordBatch) -> Record:
    """The record of a batch of one row. Its arrays are its own: they may be written to and outlive the file."""

    def array(name: str) -> np.ndarray:
        values = batch.column(name).flatten().to_numpy(zero_copy_only=False)
        return np.array(values, _ARRAYS.get(name, np.float32))

    def value(name: str) -> object:
        return batch.column(name)[0].as_py()

    per_object = value("keypoints_per_object")
    keypoints = None if per_object is None else array("keypoints").reshape(-1, int(str(per_object)), 3)
    arrays = {name: array(name) for name in _ARRAYS}
    arrays |= {name: arrays[name].reshape(-1, 4) for name in ("boxes", "ignore_regions")}
    return Record(
        **{name: value(name) for name in ("image_id", "file_name", "width", "height", "image")},  # pyright: ignore[reportArgumentType]
        **arrays,
        segmentations=tuple(batch.column("segmentations").flatten().to_pylist()),
        keypoints=keypoints,
    )
