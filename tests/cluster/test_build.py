"""A run's objects follow from its recipe, and what cannot work is refused before a step, in plain words."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster import build, gate, packing
from cluster.config import RunConfig, check, load, to_tree
from cluster.grammar import ConfigError
from cluster.precompute.keys import cache_folder, cache_key
from cluster.scoring import ground_truth
from cluster.suspects import suspicion
from cluster.teaching import open_teachers
from data_sharding.batch import Taps
from data_sharding.loader import evaluation_batches
from data_sharding.world import World
from kd import student
from kd.detectors.base import Detections
from kd.methods import fitnet, hinton
from kd.methods.base import PyramidAssistant
from tests.cluster.test_scoring import SMALL
from tests.end_to_end.commands import save_teacher
from tests.kd import fake

TAUGHT = SMALL | {"distill.scalekd.sdf": {"width": 16, "token_width": 16}, "distill.scalekd.csa": {"heads": 2}}


def recipe(storage: Path, teacher: Path, **more: Any) -> RunConfig:
    settings = {"storage": str(storage), "teachers.0.weights": str(teacher), "teachers.0.gate_images": 4}
    return load("digits_scalekd", TAUGHT | settings | more)


def test_data_that_is_not_packed_is_told_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"split 'train' is not packed yet; run `python -m cluster\.pack`"):
        build.open_train(recipe(tmp_path, tmp_path))


def test_the_student_is_the_same_with_and_without_methods(tmp_path: Path) -> None:
    taught = recipe(tmp_path, tmp_path)
    plain = replace(taught, distill={}, teachers=())

    torch.manual_seed(1)
    first = build.build_student(taught, 10).state_dict()
    torch.manual_seed(2)
    second = build.build_student(plain, 10).state_dict()
    third = build.build_student(replace(plain, seed=9), 10).state_dict()

    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert any(not torch.equal(value, third[name]) for name, value in first.items())


def test_a_missing_teacher_is_told_with_what_to_set(tmp_path: Path) -> None:
    config = recipe(tmp_path, tmp_path / "nowhere")
    packed = packing.pack_splits(config)
    with pytest.raises(ConfigError, match=r"'teacher' is read from .*nowhere.* point teachers\.N\.weights"):
        build.load_teacher(config.teachers[0], packed["train"].categories)


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path) -> None:
    config = recipe(tmp_path, save_teacher(tmp_path / "weights"))
    categories = packing.pack_splits(config)["train"].categories
    swapped = (categories[1], categories[0], *categories[2:])
    with pytest.raises(ConfigError, match=r"same in the same order \(0: data set '1', teacher '0'"):
        build.load_teacher(config.teachers[0], swapped)


def test_a_teacher_below_its_gate_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(tmp_path, save_teacher(tmp_path / "weights"), **{"teachers.0.min_ap": 5.0})
    packing.pack_splits(config)
    monkeypatch.setattr(gate, "_on_worker", lambda look, config, teacher: look(to_tree(config), teacher.name))
    with pytest.raises(ConfigError, match=r"reaches AP \d\.\d on the first 4 .* at 2x, its gate is min_ap=5") as told:
        gate.require_good_teachers(config)
    assert "its weights are random" in str(told.value)


class Oracle(fake.FakeDetector):
    """Knows the labels of the pixels that it recognises, once they are standardised as it is used to."""

    def __init__(self, val: Any, names: list[int], mean: float, factor: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3,), 0.0))
        self.register_buffer("std", torch.full((3,), 1.0))
        self.names, self.known = names, {}
        for batch in evaluation_batches(val.dataset, val.views, world=World(), batch=2, factor=factor):
            seen = self.normalise(batch.images, batch.geometry)
            labelled = zip(seen, batch.boxes, batch.labels, strict=True)
            self.known |= {self._key(x): (boxes, labels) for x, boxes, labels in labelled}
        self.mean += mean

    def features(self, images: Tensor, freeze_backbone: bool = False) -> Taps:
        return Taps(pyramid=(images,))

    def predict(self, pyramid: Any, geometry: Any, proposals: Any = None, sampling: Any = None) -> Any:
        return pyramid[0]

    def detect(self, outputs: Any, geometry: Any) -> list[Detections]:
        nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
        found = [self.known.get(self._key(x), nothing) for x in outputs]
        return [
            Detections(b, torch.linspace(0.9, 0.8, len(b)), torch.tensor(self.names)[labels]) for b, labels in found
        ]

    def _key(self, image: Tensor) -> int:
        return round(float(image.double().sum()) * 100)


TEN = list(range(10))


@pytest.mark.parametrize(
    ("names", "mean", "said"),
    [
        ([*TEN[1:], 0], 0.0, r"it finds the objects \(AP 100\.0 if classes.* is mostly called .*teachers\.N\.classes"),
        (TEN, 0.1, r"those of pixels in 0\.\.1 \(mean \[0, 0, 0\], std \[1, 1, 1\]\), it reaches AP 100\.0 instead of"),
    ],
    ids=["permuted classes", "wrong normalisation"],
)
def test_the_gate_says_what_is_likely_wrong(tmp_path: Path, names: list[int], mean: float, said: str) -> None:
    config = recipe(tmp_path, tmp_path)
    packing.pack_splits(config)
    val = build.open_val(config)
    oracle, truth = Oracle(val, names, mean, factor=1), ground_truth(val)
    found = suspicion(oracle, val, truth, config.evaluation, device=torch.device("cpu"), factor=1, needed=50.0)
    assert re.search(said, found)
    assert torch.equal(oracle.mean, torch.full((3,), mean)), "left as it was"


def test_named_classes_of_a_teacher_are_taken_in_our_order(tmp_path: Path) -> None:
    config = recipe(tmp_path, save_teacher(tmp_path / "weights"))
    categories = packing.pack_splits(config)["train"].categories[:3]
    given = replace(config.teachers[0], classes={"0": "7", "1": 0})
    loaded = build.load_teacher(given, categories)
    whole = student.load(config.teachers[0].weights)[0]
    assert loaded.detector.shapes.num_classes == 3
    rows = [dict(d.named_parameters())["head.classification_head.cls_logits.bias"] for d in (loaded.detector, whole)]
    assert torch.equal(rows[0], rows[1][[7, 0, 2]])
    assert loaded.sha256 != student.load(config.teachers[0].weights)[1].sha256, "the gate must not mistake them"
    with pytest.raises(ConfigError, match=r"'teacher': .* does not know 'car'"):
        build.load_teacher(replace(given, classes={"0": "car"}), categories)


def test_a_checkpoint_of_another_tool_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"model": {"backbone.bottom_up.stem.conv1.weight": torch.zeros(1)}}, tmp_path / "theirs.pth")
    config = recipe(tmp_path, tmp_path / "theirs.pth")
    with pytest.raises(ConfigError, match=r"teachers: 'teacher': .*theirs\.pth was written by Detectron2"):
        build.load_teacher(config.teachers[0], packing.pack_splits(config)["train"].categories)


def test_every_lesson_has_its_own_weights_whatever_was_drawn_before(tmp_path: Path) -> None:
    config = recipe(tmp_path, save_teacher(tmp_path / "weights"))
    train = packing.pack_splits(config)["train"]
    shapes = build.build_student(config, 10).shapes
    teachers = {"teacher": build.load_teacher(config.teachers[0], train.categories)}

    first = build.build_lessons(config, shapes, teachers, World(), torch.device("cpu"))
    torch.rand(5)
    second = build.build_lessons(config, shapes, teachers, World(), torch.device("cpu"))

    assert list(first.lessons) == ["scalekd"]
    assert list(first.assistants) == ["scalekd"]
    for mine, its in (
        (first.lessons["scalekd"][1], second.lessons["scalekd"][1]),
        (first.assistants["scalekd"].assistant, second.assistants["scalekd"].assistant),
    ):
        other = its.state_dict()
        assert all(torch.equal(value, other[name]) for name, value in mine.state_dict().items())


def test_an_assistant_may_have_a_head_of_the_students_make(tmp_path: Path) -> None:
    config = recipe(tmp_path, save_teacher(tmp_path / "weights"), **{"distill.scalekd.csa.head": "own"})
    train = packing.pack_splits(config)["train"]
    student = build.build_student(config, 10)
    teachers = {"teacher": build.load_teacher(config.teachers[0], train.categories)}
    taught = build.build_lessons(config, student.shapes, teachers, World(), torch.device("cpu"))
    assistant = taught.assistants["scalekd"].assistant
    assert isinstance(assistant, PyramidAssistant)
    own = assistant.predictor(student)
    assert own is not student
    mine, its = ({n: p.shape for n, p in d.named_parameters() if n.startswith("head.")} for d in (own, student))
    assert mine == its


def test_a_lesson_that_asks_the_teachers_head_gets_it_and_keeps_no_more(tmp_path: Path) -> None:
    config = recipe(tmp_path, save_teacher(tmp_path / "weights"))
    config = replace(config, distill={"hinton": hinton.Config(), "fitnet": fitnet.Config()})
    train = packing.pack_splits(config)["train"]
    student = build.build_student(config, 10)
    teachers = {"teacher": build.load_teacher(config.teachers[0], train.categories)}
    assert config.teachers[0].cache
    lessons = build.build_lessons(config, student.shapes, teachers, World(), torch.device("cpu")).lessons
    head = lessons["hinton"][0].head
    assert head is not None
    assert lessons["fitnet"][0].head is None
    assert {name.partition(".")[0] for name, _ in head._head.named_parameters()} == {"head"}


def test_a_teacher_whose_answers_are_of_other_places_is_refused_by_both_names(tmp_path: Path) -> None:
    config = recipe(tmp_path, save_teacher(tmp_path / "weights"), **{"student.point_offset": 0.5})
    config = replace(config, distill={"hinton": hinton.Config()})
    train = packing.pack_splits(config)["train"]
    student = build.build_student(config, 10)
    teachers = {"teacher": build.load_teacher(config.teachers[0], train.categories)}
    with pytest.raises(
        ValueError, match=r"student's places are fcos, point_offset 0.5.*teacher's fcos, point_offset 0.0"
    ):
        build.build_lessons(config, student.shapes, teachers, World(), torch.device("cpu"))


def test_the_cache_key_names_what_decides_its_bytes(tmp_path: Path) -> None:
    config = recipe(tmp_path, save_teacher(tmp_path / "weights"))
    packing.pack_splits(config)
    train = build.open_train(config)
    teacher = build.load_teacher(config.teachers[0], train.dataset.categories)
    shapes = build.build_student(config, 10).shapes

    key = cache_key(config, teacher, shapes, train)
    again = cache_key(check(to_tree(config), "again"), teacher, shapes, train)

    assert key == again
    assert key.taps == ("c5", "p3", "p4", "p5")
    assert key.strides == (32, 8, 16, 32)
    assert key.weights_sha256 == student.load(config.teachers[0].weights)[1].sha256
    pooled = check(to_tree(replace(config, teachers=(replace(config.teachers[0], align="pool"),))), "pooled")
    assert cache_folder(config, key) != cache_folder(
        pooled, cache_key(pooled, replace(teacher, config=pooled.teachers[0]), shapes, train)
    )


def test_the_labels_of_a_split_are_read_without_its_pixels(tmp_path: Path) -> None:
    config = recipe(tmp_path, tmp_path)
    packing.pack_splits(config)
    truth = ground_truth(build.open_val(config), first=3)
    assert len(truth.image_ids) == 3


def test_a_gate_that_no_node_can_hold_is_refused_instead_of_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray queues a task that needs more CPUs than there are for ever."""
    import ray

    config = recipe(tmp_path, save_teacher(tmp_path / "weights"), **{"resources.threads": 3})
    packing.pack_splits(config)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(ConfigError, match=r"resources: 1 worker\(s\) need 3 CPUs, the cluster has 2"):
        gate.require_good_teachers(config)


def test_a_method_without_a_teacher_is_one_lesson_of_the_run(tmp_path: Path) -> None:
    """With no teacher, and beside one, whom only the other method asks."""
    weights = save_teacher(tmp_path / "weights")
    alone = load("digits_scalekd", SMALL | {"storage": str(tmp_path), "teachers": [], "distill": {"lgd": {"heads": 4}}})
    assert not alone.taught
    assert build.reads_of(alone) == frozenset()
    beside = recipe(tmp_path, weights, **{"distill.lgd.heads": 4})
    train = packing.pack_splits(beside)["train"]
    student = build.build_student(beside, 10).shapes
    staff = open_teachers(alone, student, build.open_train(beside), torch.device("cpu"))
    assert staff.teachers == {}
    loaded = {"teacher": build.load_teacher(beside.teachers[0], train.categories)}
    cpu = torch.device("cpu")
    one, two = (build.build_lessons(c, student, t, World(), cpu) for c, t in ((alone, staff.loaded), (beside, loaded)))
    assert {name: lesson.teacher for name, (lesson, _) in one.lessons.items()} == {"lgd": None}
    assert {name: lesson.teacher for name, (lesson, _) in two.lessons.items()} == {"scalekd": "teacher", "lgd": None}
    first, second = (x.assistants["lgd"].assistant.state_dict() for x in (one, two))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
