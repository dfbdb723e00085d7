"""Look for objects in images with a saved student: boxes as COCO results, and pictures with the boxes drawn."""

import sys
from typing import TYPE_CHECKING

from cluster.student.command import command

if TYPE_CHECKING:
    from cluster.student.command import Order

SETTINGS = """\
settings (key=value, values in JSON):
  out=predictions          the folder for detections.json, images.json and pictures/
  score=0.3                detections of a lower score are left out
  slices.size=[640,640]    look at overlapping tiles of (height, width) pixels; slices=null: at the whole image alone.
                           Unless given, as the student was evaluated
  slices.overlap=0.2       part of a tile that its neighbour sees too
  slices.whole=true        look at the whole image as well (also: slices.match, slices.nms, slices.detections)
  pictures=true            write the pictures
  batch=8 threads=1        images or tiles per forward; processor cores
  device=null              cpu or cuda; null: a GPU if there is one

detections.json holds COCO results in pixels of the upright image, images.json the images by id and the categories:
together `COCO("images.json").loadRes("detections.json")`.

exit codes:
  0 done; 3 done, but some images could not be read (they are told, and listed in images.json); 2 something to put right

examples:
  python -m cluster.predict runs/hit_uav_scalekd/student photo.jpg more_photos/
  python -m cluster.predict runs/hit_uav_scalekd/student photos/ slices.size=[640,640] score=0.4 out=found
"""


def act(order: "Order") -> int:
    """Predict and print where everything is."""
    from cluster.student.command import settings_of
    from cluster.student.predicting import Settings, base_of, predict
    from cluster.terminal import table

    done = predict(order.student, order.images, settings_of(Settings, base_of(order.student), order))
    table(f"{order.student} on {len(order.images)} image(s)", [{"what": k, "value": v} for k, v in done.rows()])
    return 3 if done.broken else 0


if __name__ == "__main__":
    sys.exit(command("predict", __doc__ or "", SETTINGS, act))
