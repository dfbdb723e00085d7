"""Every label format the way a new user goes: pack, train, evaluate, predict and export, by the verbs, on real samples.

    python -m benchmarks.formats --data FOLDER [--only voc]

FOLDER holds `coco/tinycoco`, `visdrone`, `voc/VOC100`, `hit_uav` and `weights`. Three formats train on a few dozen
images for some minutes and look at the same images again: a student that knows its images by heart finds their
objects, and where labels, pixels or boxes do not meet it finds none. Those numbers say nothing of new images; HIT-UAV's
are of its validation images. What each verb printed is kept in `STORAGE/NAME/*.log`.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.store import Store, fingerprint

SHARED = (
    "student.width=64", "student.head_depth=2", "optim.optimizer=adamw", "optim.lr=0.001", "optim.weight_decay=0.05",
    "optim.warmup=20", "optim.schedule=flat_cosine", "optim.flat=0.5", "optim.milestones=[]", "evaluation.every=0",
    "views.count=1", "views.flip=0.0", "resources.workers=1", "resources.threads=1", "resources.gpu=null",
    "resources.precision=fp32",
)  # fmt: skip
"""A small student that can learn thirty images in some minutes, on whatever machine this is."""


@dataclass(frozen=True)
class Road:
    """One format: a shipped recipe, what to lay over it, and images to predict."""

    recipe: str
    overrides: tuple[str, ...]
    pictures: str
    """Images to predict, as a pattern below the data's folder."""


def roads(data: Path) -> dict[str, Road]:
    """The four formats by name."""
    weights = f"student.backbone.weights={data / 'weights' / 'mobilenet_v2-b0353104.pth'}"
    coco, voc, uav = data / "coco" / "tinycoco", data / "voc" / "VOC100", data / "hit_uav"
    drone = data / "visdrone" / "VisDrone2019-DET-train"
    labelled = _labelled(coco / "images/train2017", coco / "annotations/instances_train2017.json")
    thermal = _labelled(uav / "normal_json/train", uav / "coco/instances_train.json")
    unseen = _labelled(uav / "normal_json/val", uav / "coco/instances_val.json")
    folder = json.dumps([{"folder": str(voc), "list": "test"}])
    return {
        "coco": Road(
            "scalekd_fcos_r50_coco",
            (
                f"data.train={labelled}", f"data.val={labelled}", "teachers=[]", "distill={}",
                'student.backbone={"name": "mobilenetv2", "norm": "frozen"}', weights, "student.levels=[3,4,5,6]",
                "views.short_side=[256]", "views.long_side=384", "views.buckets=[[256,384],[384,256]]",
                "optim.batch=8", "optim.steps=300",
            ),
            "coco/tinycoco/images/train2017/*.jpg",
        ),
        "visdrone": Road(
            "visdrone_student",
            (
                f"data.train={drone}", f"data.val={drone}", weights,
                "student.levels=[2,3,4,5]", "views.short_side=[320]", "views.long_side=576",
                "views.buckets=[[384,640]]", "evaluation.views.short_side=640",
                "evaluation.views.long_side=1152", "evaluation.views.buckets=[[768,1152],[896,1152]]", "optim.batch=4",
                "optim.steps=250",
            ),
            "visdrone/VisDrone2019-DET-train/images/*.jpg",
        ),
        "voc": Road(
            "voc_student",
            (
                f"data.train={folder}", f"data.val={folder}", weights, "student.levels=[3,4,5,6]",
                "views.short_side=[192]", "views.long_side=256", "views.buckets=[[256,256]]", "optim.batch=8",
                "optim.steps=500",
            ),
            "voc/VOC100/JPEGImages/*.jpg",
        ),
        "hit_uav": Road(
            "hit_uav_student",
            (
                f"data.train={thermal}", f"data.val={unseen}", weights,
                "student.levels=[2,3,4]", "optim.batch=8", "optim.steps=300",
            ),
            "hit_uav/normal_json/val/*.jpg",
        ),
    }  # fmt: skip


def _labelled(images: Path, annotations: Path) -> str:
    """A split in COCO's form, as the command line takes it."""
    return json.dumps({"images": str(images), "annotations": str(annotations)})


def main() -> None:
    """Go every road that has no row yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the samples")
    parser.add_argument("--storage", type=Path, default=Path("runs/formats"))
    parser.add_argument("--only", nargs="*", help="formats to go; all by default")
    arguments = parser.parse_args()
    data = arguments.data.resolve()
    if not (data / "voc").exists():
        parser.error(
            f"--data {arguments.data}: no samples there; expected coco, visdrone, voc, hit_uav and weights in it"
        )
    store = Store(Path("benchmarks/results/formats.json"), fingerprint((SHARED, roads(Path("data")))))
    for name, road in roads(data).items():
        if store.row(name, 0) is None and (not arguments.only or name in arguments.only):
            store.add({"method": name, "seed": 0} | go(name, road, data, arguments.storage.resolve()))
    show(store.read()["rows"])


def go(name: str, road: Road, data: Path, storage: Path) -> dict[str, Any]:
    """All verbs of one road; what they left behind, as a row. A verb that fails stops it."""
    settings = [road.recipe, *SHARED, *road.overrides, f"name={name}", f"storage={storage}"]
    folder = storage / name
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.time()
    for verb in ("pack", "train", "evaluate"):
        run(verb, settings, folder)
    minutes = (time.time() - begin) / 60
    pictures = [str(path) for path in sorted(data.glob(road.pictures))[:4]]
    run("predict", [str(folder / "student"), *pictures, f"out={folder / 'predicted'}"], folder)
    run("export", [str(folder / "student"), pictures[0], f"out={folder / 'student.onnx'}"], folder)
    scores = json.loads((folder / "evaluation.json").read_text())
    found = json.loads((folder / "predicted" / "detections.json").read_text())
    chosen = {key: round(scores[key], 1) for key in ("AP", "AP50", "AP_small", "AP_medium", "AP_large")}
    own = [
        f"{key} {scores[key]:.1f}"
        for key in ("visdrone_AP", "visdrone_AR500", "voc_AP", "voc_AP_2007")
        if key in scores
    ]
    chosen["own protocol"] = ", ".join(own) or "COCO's"
    return chosen | {"predicted": f"{len(found)} in {len(pictures)} images", "minutes": round(minutes, 1)}


def run(verb: str, arguments: Sequence[str], folder: Path) -> None:
    """One verb in a process of its own, as a user starts it; what it prints is shown and kept."""
    command = [sys.executable, "-m", f"cluster.{verb}", *arguments]
    print("$ python", " ".join(command[1:4]), "...", flush=True)
    with (folder / f"{verb}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
    if process.wait():
        raise SystemExit(f"cluster.{verb} ended with exit code {process.returncode}; see {folder / verb}.log")


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """The table."""
    table = Table(title="every format by the verbs")
    shown = [{"format": row["method"]} | {k: v for k, v in row.items() if k not in ("method", "seed")} for row in rows]
    for column in shown[0] if shown else ():
        table.add_column(column)
    for row in shown:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
