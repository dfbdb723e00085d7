"""Write a saved student as ONNX, pre- and post-processing inside, checked against eager; tell its size and speed."""

import sys
from typing import TYPE_CHECKING

from cluster.student.command import command

if TYPE_CHECKING:
    from cluster.student.command import Order

SETTINGS = """\
The file takes one image (h, w, 3) uint8 RGB of a fixed size and gives boxes (n, 4) x1 y1 x2 y2 in that image's pixels,
scores (n,) and labels (n,). It is left only where ONNX Runtime finds in every image named (without any: in a photograph
and in noise) the boxes that the student finds in eager mode, to 1e-3 px.

settings (key=value, values in JSON):
  image=[512,640]    (height, width) of the images that the file takes; default: of the images named, else the student's
                     first canvas
  out=student.onnx   default: student.onnx in the student's folder
  score=0.3          the score threshold inside the graph; default: the student's own
  repeats=20         timed runs of each row of the table, after a few to warm up
  threads=1          processor cores
  compile=true       time torch.compile too (its first run compiles for a minute or more, and needs a C++ compiler)

examples:
  python -m cluster.export runs/hit_uav_scalekd/student photos/
  python -m cluster.export runs/hit_uav_scalekd/student image=[1080,1920] score=0.3 out=camera.onnx
"""


def act(order: "Order") -> int:
    """Export and print the tables."""
    from cluster.student.command import settings_of
    from cluster.student.exporting import Settings, export
    from cluster.terminal import table

    done = export(order.student, order.images, settings_of(Settings, {}, order))
    table("one image, pixels to boxes, on the CPU", done.speeds)
    table(str(done.path), [{"what": name, "value": value} for name, value in done.facts])
    return 0


if __name__ == "__main__":
    sys.exit(command("export", __doc__ or "", SETTINGS, act))
