"""Does a method teach what the teacher sees of each image? On real images, with the task's loss off.

A student learns from a method's own loss alone, its gate open, images and views fixed. Its loss must fall by half; and
a student that was taught with the teacher's taps of other images (all pairs turned by one) must not come as far on
images that neither has seen, measured with their right taps: the shuffle takes away at least half of the fall.
Begin and end are measured with the same assistant, the one at the end. Settings are each method's own, but for the
gates; AdamW's steps do not depend on a loss's weight.

    python -m benchmarks.learning_check --data .../hit_uav --weights .../mobilenet_v2-b0353104.pth
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.classroom import FACTOR, Classroom, built, every_method, looked
from benchmarks.plain_run import keep_freed_memory
from data_sharding.batch import Batch, Geometry, Taps
from data_sharding.datasets import coco
from data_sharding.files import write_atomically
from data_sharding.images import decode
from data_sharding.views import ViewConfig, draw, place_labels, render
from kd.backbones import mobilenetv2
from kd.detectors import fcos
from kd.detectors.base import Detector
from kd.methods.base import MethodConfig
from kd.optimise import OptimConfig

ROOT = Path(__file__).parent.parent
VIEWS = ViewConfig(crop=(256, 256), crop_on_object=1.0, short_side=(128,), flip=0.0, buckets=((128, 128),))
"""The sensor's own pixels at half resolution, each on an object."""
BATCH = 6
FALL, SHUFFLED = 0.5, 0.5


@dataclass(frozen=True, kw_only=True)
class Lecture:
    """Fixed batches and what the teacher sees of them."""

    batches: Sequence[Batch]
    taps: Sequence[Taps]

    def shuffled(self) -> "Lecture":
        """Every image with the taps of its neighbour in the batch."""
        return replace(self, taps=[_turned(taps) for taps in self.taps])


@dataclass(frozen=True, kw_only=True)
class Found:
    """What came out for one method: its loss on the images that were learnt from, and on others."""

    before: float
    after: float
    held_out_before: float
    held_out_after: float
    held_out_shuffled: float
    """After learning from the wrong taps."""
    seconds: float
    """Of this process's processors."""

    @property
    def fall(self) -> float:
        """Share of the loss that is gone."""
        return 1 - self.after / self.before

    @property
    def removed(self) -> float:
        """Share of the fall on held-out images that the shuffle takes away."""
        fall = self.held_out_before - self.held_out_after
        return (self.held_out_shuffled - self.held_out_after) / fall if fall > 0 else 0.0

    @property
    def verdict(self) -> str:
        """`passes`, or what is missing."""
        learns, theirs = self.fall >= FALL, self.removed >= SHUFFLED
        return "passes" if learns and theirs else "does not see the images" if learns else "does not learn"


def main() -> None:
    """The command line."""
    options = _options()
    torch.set_num_threads(1)
    keep_freed_memory()
    path = options.results or ROOT / "benchmarks" / "results" / "learning_check.json"
    if not options.show:
        content = checked(options)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    print("\n".join(report(json.loads(path.read_text()))))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = ROOT / ".." / "shared" / "data"
    parser.add_argument("--data", type=Path, default=shared / "hit_uav", help="the folder of HIT-UAV")
    parser.add_argument("--weights", type=Path, default=shared / "weights" / "mobilenet_v2-b0353104.pth")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--images", type=int, default=24, help="to learn from; half as many are held out")
    parser.add_argument("--teacher-steps", type=int, default=150, help="that the teacher learns the task for, first")
    parser.add_argument("--methods", help="only these, with commas between")
    parser.add_argument("--results", type=Path, help="default benchmarks/results/learning_check.json")
    parser.add_argument("--show", action="store_true", help="only print what is stored")
    return parser.parse_args()


def checked(options: argparse.Namespace) -> dict[str, Any]:
    """Every method's numbers, told as they come."""
    classes, learnt, unseen = real_images(options.data, options.images)
    student, teacher = prepared(str(options.weights), classes, learnt, options.teacher_steps)
    lectures = [_lecture(student, teacher, classes, batches) for batches in (learnt, unseen)]
    rows: dict[str, Any] = {}
    for name, config in every_method().items():
        if options.methods is None or name in options.methods.split(","):
            rows[name] = _row(name, config, student, teacher, classes, lectures, options.steps)
            print("\n".join(_told(name, rows[name])), flush=True)
    return {"steps": options.steps, "images": options.images, "teacher_steps": options.teacher_steps, "rows": rows}


def _row(
    name: str, config: MethodConfig, student: fcos.Config, teacher: Detector, classes: int,
    lectures: Sequence[Lecture], steps: int,
) -> dict[str, Any]:  # fmt: skip
    try:
        found = check(name, config, student, teacher, classes, *lectures, steps=steps)
    except ValueError as error:
        return {"refused": str(error)}
    return vars(found) | {"fall": found.fall, "removed": found.removed, "verdict": found.verdict}


def real_images(folder: Path, count: int) -> tuple[int, list[Batch], list[Batch]]:
    """The number of classes, `count` images to learn from and half as many held out, in small batches; each with
    its rendering for the teacher."""

    def split(name: str) -> coco.Split:
        return coco.Split(images=folder / "normal_json" / name, annotations=folder / "coco" / f"instances_{name}.json")

    config = coco.Config(train=split("train"), val=split("val"), ignore_categories=("DontCare",))
    found = (_batches(config, name, number) for name, number in (("train", count), ("val", count // 2)))
    return len(coco.categories(config)), *found  # pyright: ignore[reportReturnType]


def _batches(config: coco.Config, split: str, count: int) -> list[Batch]:
    """The first images that have objects, drawn from the whole split at even distances."""
    source = coco.source(config, split)
    records = (source.read(int(i)) for i in np.linspace(0, source.count - 1, min(source.count, 2 * count)).astype(int))
    chosen = [record for record in records if len(record.boxes)][:count]
    made = []
    for start in range(0, len(chosen) - BATCH + 1, BATCH):
        part = chosen[start : start + BATCH]
        views = [draw(VIEWS, source.fingerprint, r.image_id, r.width, r.height, r.boxes, 0) for r in part]
        pixels = [decode(record.image, record.file_name) for record in part]
        labels = [place_labels(record, v, min_visible=VIEWS.min_visible) for record, v in zip(part, views, strict=True)]
        made.append(
            Batch(
                images=torch.stack([render(x, v) for x, v in zip(pixels, views, strict=True)]),
                geometry=Geometry(views[0].canvas, torch.tensor([v.size for v in views])),
                boxes=tuple(boxes for boxes, _, _ in labels),
                labels=tuple(classes for _, classes, _ in labels),
                ignore=tuple(ignored for _, _, ignored in labels),
                image_ids=tuple(record.image_id for record in part),
                views=(0,) * BATCH,
                scaled_images={FACTOR: torch.stack([render(x, v, FACTOR) for x, v in zip(pixels, views, strict=True)])},
            )
        )
    return made


def prepared(weights: str, classes: int, batches: Sequence[Batch], steps: int) -> tuple[fcos.Config, Detector]:
    """The student's settings, and a teacher that has learnt the task for some steps at twice the pixels."""
    backbone = mobilenetv2.Config(norm="frozen", weights=weights)
    student = fcos.Config(backbone=backbone, width=32, head_depth=1, levels=(3, 4, 5))
    config, device = replace(student, width=64, levels=(4, 5, 6)), torch.device("cpu")
    room = Classroom(config, built(config, classes, device), classes, None, None, _optim(max(steps, 1)), device)
    for step in range(steps):
        batch = batches[step % len(batches)]
        large = replace(
            batch,
            images=batch.scaled_images[FACTOR],
            geometry=batch.geometry.scaled(FACTOR),
            boxes=tuple(FACTOR * boxes for boxes in batch.boxes),
            ignore=tuple(FACTOR * boxes for boxes in batch.ignore),
        )
        room.step(large, Taps(), step)
    return student, room.student.eval().requires_grad_(False)


def _optim(steps: int) -> OptimConfig:
    return OptimConfig(optimizer="adamw", lr=1e-3, weight_decay=0.0, batch=BATCH, steps=steps, warmup=0, clip_norm=10.0)


def _lecture(student: fcos.Config, teacher: Detector, classes: int, batches: Sequence[Batch]) -> Lecture:
    looks = built(student, classes, torch.device("cpu"))
    return Lecture(batches=batches, taps=[looked(teacher, looks, batch) for batch in batches])


def _turned(taps: Taps) -> Taps:
    return Taps(None if taps.c5 is None else taps.c5.roll(1, 0), tuple(x.roll(1, 0) for x in taps.pyramid))


def check(
    name: str, config: MethodConfig, student: fcos.Config, teacher: Detector, classes: int,
    learnt: Lecture, unseen: Lecture, *, steps: int,
) -> Found:  # fmt: skip
    """Let one student learn from the right taps and one from the shuffled ones; both measured with the right ones."""
    began = time.process_time()
    rooms = [Classroom(student, teacher, classes, name, config, _optim(steps), torch.device("cpu")) for _ in range(2)]
    right, wrong = (room.engine.distiller for room in rooms)
    first = copy.deepcopy(right.state_dict())
    for room, lecture in zip(rooms, (learnt, learnt.shuffled()), strict=True):
        learn(room, lecture, steps)
    last, other = copy.deepcopy(right.state_dict()), wrong.state_dict()

    def loss(state: Mapping[str, Any], lecture: Lecture) -> float:
        right.load_state_dict(state)
        return mean_loss(rooms[0], lecture)

    return Found(
        before=loss(first, learnt),
        after=loss(last, learnt),
        held_out_before=loss(first, unseen),
        held_out_after=loss(last, unseen),
        held_out_shuffled=loss(other, unseen),
        seconds=time.process_time() - began,
    )


def learn(room: Classroom, lecture: Lecture, steps: int) -> None:
    """Steps on the method's own loss alone."""
    for step in range(steps):
        number = step % len(lecture.batches)
        room.engine.backward(room.own_loss(lecture.batches[number], lecture.taps[number], learns=True))
        room.engine.step()


@torch.no_grad()
def mean_loss(room: Classroom, lecture: Lecture) -> float:
    """The method's own loss, averaged over the batches."""
    found = [room.own_loss(b, t).item() for b, t in zip(lecture.batches, lecture.taps, strict=True)]
    return sum(found) / len(found)


def report(content: Mapping[str, Any]) -> Iterator[str]:
    """The table of what is stored."""
    yield f"{content['images']} images, {content['steps']} steps on the method's own loss; a teacher of "
    yield f"{content['teacher_steps']} steps; wanted: a fall of {FALL:.0%}, of it {SHUFFLED:.0%} gone by the shuffle\n"
    yield f"{'method':14} {'fall':>8} {'held out':>9} {'shuffle removes':>16} {'seconds':>8}  verdict"
    for name, row in content["rows"].items():
        yield from _told(name, row)


def _told(name: str, row: Mapping[str, Any]) -> Iterator[str]:
    if "refused" in row:
        yield f"{name:14} does not go with this pair: {row['refused']}"
        return
    unseen = 1 - row["held_out_after"] / row["held_out_before"]
    yield (
        f"{name:14} {row['fall']:>8.0%} {unseen:>9.0%} {row['removed']:>16.0%} {row['seconds']:>8.1f}  {row['verdict']}"
    )


if __name__ == "__main__":
    main()
