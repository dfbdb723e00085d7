"""CLSD against its equations: what a classifier sees in the objects, and in the boxes that the student finds."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import get_model

from data_sharding.batch import Geometry, Outputs, Taps
from kd.blocks.classifier import MEAN, STD, _stem, cropped, standardised
from kd.blocks.pooling import pooled
from kd.methods import clsd
from kd.methods.base import Advice
from tests.kd import by_hand, fake
from tests.kd.test_hinton import regions

CANVAS = (64, 96)


def config(**changes: object) -> clsd.Config:
    given = {"weights": fake.classifier(), "classifier": fake.CLASSIFIER, "crop": 32} | changes
    return clsd.Config(**given)  # pyright: ignore[reportArgumentType]


def loss(**changes: object) -> clsd.Loss:
    return clsd.Loss(config(**changes), fake.pair())


def scene(boxes: int = 2) -> tuple[Taps, fake.Batch]:
    return fake.taps(2, 1, canvas=CANVAS), fake.batch(2, boxes, canvas=CANVAS)


def bilinear(image: Tensor, x: float, y: float) -> list[float]:
    """The image's value at a point in pixels, whose middles are at halves; beyond the border, the border's."""
    _, height, width = image.shape
    x, y = min(max(x - 0.5, 0.0), width - 1), min(max(y - 0.5, 0.0), height - 1)
    left, top = min(int(x), width - 2), min(int(y), height - 2)
    found = torch.zeros(3, dtype=torch.float64)
    for row, down in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, across in ((left, 1 - (x - left)), (left + 1, x - left)):
            found += image[:, row, column].double() * down * across
    return found.tolist()


def test_a_crop_is_the_image_sampled_evenly_in_its_box() -> None:
    images = torch.randn(2, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[2.0, 3, 10, 11], [4.0, 4, 5, 5], [-3.0, 10, 30, 40], [0.0, 0, 24, 20], [7.0, 7, 7, 7]])
    image = torch.tensor([0, 0, 1, 1, 1])
    geometry = Geometry((20, 24), torch.tensor([[20, 24], [16, 20]]))
    found = cropped(images, boxes, image, geometry, 4)
    for crop, box, number in zip(found, boxes.tolist(), image.tolist(), strict=True):
        height, width = geometry.sizes[number].tolist()
        x1, y1, x2, y2 = (min(max(v, 0), limit) for v, limit in zip(box, (width, height) * 2, strict=True))
        for row in range(4):
            for column in range(4):
                x, y = x1 + (column + 0.5) / 4 * (x2 - x1), y1 + (row + 0.5) / 4 * (y2 - y1)
                wanted = bilinear(images[number], x, y)
                assert crop[:, row, column].tolist() == pytest.approx(wanted, abs=1e-5)
    assert cropped(images, boxes[:0], image[:0], geometry, 4).shape == (0, 3, 4, 4)


def seen(batch: fake.Batch, boxes: Tensor, image: Tensor) -> Tensor:
    """What torchvision's own classifier says of the crops."""
    model = get_model(fake.CLASSIFIER, weights=None, num_classes=3).eval()
    model.load_state_dict(torch.load(fake.classifier(), weights_only=True))
    pixels = torch.stack([(batch.images[:, c].float() / 255 - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    with torch.no_grad():
        return model(cropped(pixels, boxes, image, batch.geometry, 32))


@pytest.mark.parametrize("outputs", [(), (2, 0, 1)])
def test_classes_are_the_divergence_from_what_the_classifier_sees(outputs: tuple[int, ...]) -> None:
    student, batch = scene()
    detector = fake.FakeDetector()
    mine = detector.predict(student.pyramid, batch.geometry)
    truth = detector.answers(mine, batch).truth.tolist()
    said = seen(batch, torch.cat(batch.boxes), torch.tensor([0, 0, 1, 1]))[:, list(outputs or (0, 1, 2))].tolist()
    expected = 0.0
    for place, cell in enumerate(by_hand.cells(mine.class_logits)):
        if truth[place] >= 0:
            t, s = (
                [by_hand.sigmoid(v / 2) for v in x] for x in (said[truth[place]], by_hand.at(mine.class_logits, cell))
            )
            expected += 4 * by_hand.kl([v / sum(t) for v in t], [v / sum(s) for v in s])
    found = fake.run(loss(outputs=outputs), student, Taps(), batch, detector)
    assert found["cls"].item() == pytest.approx(0.4 * expected / float(batch.totals["positives"]), rel=1e-4)
    assert expected > 0


def test_of_regions_the_background_is_impossible_to_the_classifier() -> None:
    detector, mine, _, batch = regions()
    assert mine.roi_logits is not None
    t = by_hand.softmax([v / 2 for v in seen(batch, batch.boxes[0], torch.zeros(1, dtype=torch.int64))[0].tolist()])
    s = by_hand.softmax([v / 2 for v in mine.roi_logits[0].double().tolist()])
    method = clsd.Loss(config(loc=0.0), fake.pair(detector.shapes))
    found = method.losses(Taps(), mine, Taps(), batch, Advice(detector))
    expected = 0.4 * 4 * by_hand.kl(t, s[1:]) / (2 * detector.config.roi_samples)
    assert found["cls"].item() == pytest.approx(expected, rel=1e-4)
    assert found.keys() == {"cls"}


def perfect(batch: fake.Batch, shift: float) -> tuple[fake.FakeDetector, Outputs]:
    """Outputs whose boxes are the objects', `shift` pixels to the right and down."""
    detector = fake.FakeDetector()
    outputs = detector.predict(fake.taps(len(batch), 1, canvas=CANVAS).pyramid, batch.geometry)
    truth = detector.answers(outputs, batch).truth.tolist()
    boxes, maps = torch.cat(batch.boxes), [x.detach().clone() for x in outputs.box_deltas]
    for place, (image, level, row, column) in enumerate(by_hand.cells(maps)):
        if truth[place] >= 0:
            stride = fake.STRIDES[level]
            x, y = (column + 0.5) * stride, (row + 0.5) * stride
            x1, y1, x2, y2 = (boxes[truth[place]] + shift).tolist()
            edges = torch.full((4, 5), -100.0)
            for side, far in enumerate(v / stride for v in (x - x1, y - y1, x2 - x, y2 - y)):
                low = min(3, max(0, int(far)))
                edges[side, low], edges[side, low + 1] = math.log(1 - far + low), math.log(max(far - low, 1e-9))
            maps[level][image, :, row, column] = edges.flatten()
    return detector, replace(outputs, box_deltas=tuple(m.requires_grad_() for m in maps))


def sized(batch: fake.Batch) -> fake.Batch:
    """One object that the distances of these bins reach from a cell of each level that answers for it."""
    boxes = (torch.tensor([[10.0, 10.0, 34.0, 34.0]]),) * len(batch)
    return fake.with_boxes(batch, boxes, (torch.zeros(1, dtype=torch.int64),) * len(batch))


def test_boxes_on_their_objects_teach_nothing_and_others_are_drawn_to_them() -> None:
    batch = sized(fake.batch(2, canvas=CANVAS))
    method, terms, moved = loss(cls=0.0), [], []
    for shift in (0.0, 2.0):
        detector, outputs = perfect(batch, shift)
        term = method.losses(Taps(), outputs, Taps(), batch, Advice(detector))["box"]
        term.backward()
        terms.append(term.item())
        moved.append(sum(float(x.grad.abs().sum()) for x in outputs.box_deltas if x.grad is not None))
    assert terms[0] == pytest.approx(0, abs=1e-3)
    assert terms[1] > 100 * terms[0]
    assert moved[1] > 0


def test_the_box_term_is_the_l1_of_pooled_pixels_and_first_features() -> None:
    batch = sized(fake.batch(2, canvas=CANVAS))
    detector, outputs = perfect(batch, 2.0)
    answers = detector.answers(outputs, batch)
    model = get_model(fake.CLASSIFIER, weights=None, num_classes=3).eval()
    model.load_state_dict(torch.load(fake.classifier(), weights_only=True))
    means: list[float] = []
    for image in range(2):
        places = [p for p in answers.positive.nonzero()[:, 0].tolist() if answers.image[p] == image]
        boxes = answers.decode(answers.code_of(answers.label))[places].detach()
        pixels = standardised(batch.images)
        where = torch.full((len(places),), image)
        there, right = (
            cropped(pixels, b, where, batch.geometry, 32) for b in (boxes, batch.boxes[image].expand(len(places), 4))
        )
        total = 0.0
        for a, b in zip(there, right, strict=True):
            first = [model.features[0](x[None])[0].detach() for x in (a, b)]  # pyright: ignore
            for one, other, size in ((a, b, 4), (*first, 8)):
                gap = (F.adaptive_avg_pool2d(one, size).double() - F.adaptive_avg_pool2d(other, size).double()).abs()
                total += float(gap.mean())
        means.append(total / len(places))
    found = loss(cls=0.0).losses(Taps(), outputs, Taps(), batch, Advice(detector))["box"]
    assert found.item() == pytest.approx(0.15 * sum(means) / 2, rel=1e-4)


def test_at_most_so_many_places_are_localised_drawn_by_the_images_key() -> None:
    student, batch = scene()
    answers = fake.FakeDetector().answers(fake.FakeDetector().predict(student.pyramid, batch.geometry), batch)
    counts = [int(answers.positive[answers.image == i].sum()) for i in range(2)]
    assert min(counts) > 3
    one, same, other = (
        clsd._drawn(answers, replace(batch, key=key), 3) for key in ((0, "e"), (0, "e"), (1, "e"))
    )  # fmt: skip
    assert [int(one[answers.image == i].sum()) for i in range(2)] == [3, 3]
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_without_objects_it_is_silent_and_reads_no_detectors_taps() -> None:
    student, batch = scene(boxes=0)
    assert all(term == 0 for term in fake.run(loss(), student, Taps(), batch).values())
    assert clsd.Loss.reads == frozenset()
    assert not config().taught


def test_the_student_does_not_own_the_classifier() -> None:
    method = loss()
    assert list(method.parameters()) == []
    assert method.state_dict() == {}


def test_files_that_cannot_teach_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set distill\.clsd\.weights"):
        clsd.Loss(clsd.Config(), fake.pair())
    with pytest.raises(ValueError, match="has 3 outputs, the data set 2 classes"):
        clsd.Loss(config(), fake.pair(replace(fake.SHAPES, num_classes=2)))
    with pytest.raises(ValueError, match="name an output for each class"):
        loss(outputs=(0, 1, 9))
    with pytest.raises(ValueError, match="no state dict of torchvision's squeezenet1_0"):
        loss(classifier="squeezenet1_0")
    with pytest.raises(ValueError, match="not there"):
        loss(weights=tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.pt"):
        loss(weights=tmp_path / "text.pt")
    with pytest.raises(ValueError, match="crop >= 32"):
        clsd.Config(crop=8)


@pytest.mark.parametrize(("architecture", "side"), [("resnet18", 16), ("mobilenet_v3_small", 16), ("vgg11", 32)])
def test_the_first_layer_is_found(architecture: str, side: int) -> None:
    with torch.device("meta"):
        stem = _stem(get_model(architecture, weights=None), architecture)
        assert stem(torch.zeros(1, 3, 32, 32)).shape[2:] == (side, side)


def test_a_classifier_whose_first_layer_is_not_known_is_refused() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="first layer of shufflenet_v2_x0_5"):
        _stem(get_model("shufflenet_v2_x0_5", weights=None), "shufflenet_v2_x0_5")


@pytest.mark.parametrize("shape", [(32, 32), (15, 17), (3, 5)])
def test_pooling_is_torchs_adaptive_pooling(shape: tuple[int, int]) -> None:
    maps = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pooled(maps, 4), F.adaptive_avg_pool2d(maps, 4))
