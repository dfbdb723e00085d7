"""Promises of every method file, and each method against its formula written out in loops."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch import multiprocessing as mp

from data_sharding.batch import Batch, Taps
from data_sharding.codecs.foreground import foreground_cells
from data_sharding.world import World
from kd.blocks.align import align, check_grid
from kd.methods import clsd, cwd, fitnet, hkd, hmkd, icd, mgd, mkd, pkd, scalekd
from kd.methods.base import Advice, Assistant, Method, MethodConfig
from kd.plugins import plugins
from tests.kd import fake
from tests.kd.detecting import DETECTORS
from tests.kd.detecting import detector as tiny

METHODS = plugins("kd.methods")
every_method = pytest.mark.parametrize("module", METHODS.values(), ids=METHODS.keys())
TAUGHT = {name: module for name, module in METHODS.items() if module.Config().taught}
every_taught_method = pytest.mark.parametrize("module", TAUGHT.values(), ids=TAUGHT.keys())

# A frozen random teacher module is another function than the student's: equal c5 do not mean equal tokens.
# A generator restores what was masked, and errs.
SYMMETRIC: dict[str, MethodConfig] = {
    "scalekd": scalekd.Config(sdf=scalekd.Sdf(teacher="shared"), csa=scalekd.Csa(heads=2)),
    "mgd": mgd.Config(masked=0.0, layers=0),
    "mkd": mkd.Config(zeta=0.0),
    "icd": icd.Config(values="shared", decoder=fake.DECODER),
    "hmkd": hmkd.Config(small=hmkd.Small(values="shared"), decoder=fake.DECODER, inquiry=fake.INQUIRY),
}
# What a method cannot be without: a classifier's weights.
USUAL: dict[str, Callable[[], MethodConfig]] = {
    "clsd": lambda: clsd.Config(weights=fake.classifier(), classifier=fake.CLASSIFIER, crop=32)
}
# Statistics over the batch cannot be had in parts; the cluster test below compares them over ranks.
DIVISIBLE: dict[str, MethodConfig] = {"pkd": pkd.Config(statistics="image"), "hkd": hkd.Config(scale="none")}
# Terms divided by a moving average begin at 1, whatever the teacher. A decoder of 256 channels is slow.
PLAIN: dict[str, MethodConfig] = {
    "hkd": hkd.Config(scale="none"),
    "icd": icd.Config(decoder=fake.DECODER),
    "hmkd": hmkd.Config(decoder=fake.DECODER, inquiry=fake.INQUIRY),
}
# Without boxes there are no positions near them, or none that answer for them.
NEAR_OBJECTS = {"fgfi", "zoominnet", "hinton", "ld", "clsd", "icd"}
# An assistant whose width must fit the narrow taps of these tests.
NARROW: dict[str, MethodConfig] = {"scalekd": scalekd.Config(csa=scalekd.Csa(heads=2))}


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def build(module: ModuleType, config: MethodConfig | None = None, teacher: fake.Shapes = fake.SHAPES) -> Method:
    return module.Loss(config or usual(module), fake.pair(teacher=teacher))


def usual(module: ModuleType) -> MethodConfig:
    name = short_name(module)
    if name in PLAIN:
        return PLAIN[name]
    return USUAL[name]() if name in USUAL else module.Config()


def adviser(
    module: ModuleType, config: MethodConfig | None = None, teacher: fake.Shapes = fake.SHAPES
) -> Assistant | None:
    """A new assistant of the method, if it has one."""
    if not hasattr(module, "Assistant"):
        return None
    return module.Assistant(config or NARROW.get(short_name(module), usual(module)), fake.pair(teacher=teacher))


def imitation(terms: dict[str, Tensor]) -> float:
    """The sum of the terms that compare maps, or of all of a method that has none."""
    maps = [term for name, term in terms.items() if name not in ("cls", "box")]
    return sum(term.item() for term in maps or terms.values())


def short_name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


@every_method
@pytest.mark.parametrize("canvas", [(32, 32), (96, 136), (128, 128)], ids=str)
@pytest.mark.parametrize(("images", "boxes"), [(1, 0), (1, 2), (2, 0), (3, 2)])
@pytest.mark.parametrize("wide", [False, True])
def test_terms_are_finite_scalars_that_never_reach_the_teacher(
    module: ModuleType, canvas: tuple[int, int], images: int, boxes: int, wide: bool
) -> None:
    shapes = fake.wider() if wide else fake.SHAPES
    student = fake.require_grad(fake.taps(images, 1, canvas=canvas))
    teacher = fake.require_grad(fake.taps(images, 2, shapes, canvas))
    batch = fake.batch(images, boxes, canvas=canvas)
    assistant = adviser(module, teacher=shapes)
    terms = fake.run(build(module, teacher=shapes), student, teacher, batch, assistant=assistant)
    assert terms
    for term in terms.values():
        assert term.shape == ()
        assert term.isfinite()
    torch.stack(list(terms.values())).sum().backward()
    for x in fake.tensors(student):
        assert x.grad is None or x.grad.isfinite().all()
    assert all(x.grad is None for x in fake.tensors(teacher))


@every_method
@pytest.mark.parametrize("boxes", [0, 2])
def test_the_student_and_every_parameter_are_moved(module: ModuleType, boxes: int) -> None:
    shapes, method = fake.wider(), build(module, teacher=fake.wider())
    student = fake.require_grad(fake.taps(2, 1))
    assistant = adviser(module, teacher=shapes)
    terms = fake.run(method, student, fake.taps(2, 2, shapes), fake.batch(2, boxes), assistant=assistant)
    torch.stack(list(terms.values())).sum().backward()
    moved = any(x.grad is not None and x.grad.abs().max() > 0 for x in fake.tensors(student))
    assert moved == (boxes > 0 or short_name(module) not in NEAR_OBJECTS)
    dead = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert dead == []


@every_taught_method
def test_a_student_that_equals_its_teacher_is_not_moved(module: ModuleType) -> None:
    """In gradient, not in value: a cross-entropy has the target's entropy as its floor."""
    config = SYMMETRIC.get(short_name(module))
    method, assistant = build(module, config), adviser(module, config)
    teacher = fake.taps(2, 1)
    student = fake.require_grad(teacher)
    terms = fake.run(method, student, teacher, fake.batch(2), assistant=assistant)
    assert imitation(terms) == pytest.approx(0, abs=1e-5)
    torch.stack(list(terms.values())).sum().backward()
    for x in fake.tensors(student):
        assert x.grad is None or x.grad.abs().max() < 1e-5


@every_method
def test_bf16_autocast_agrees_with_fp32(module: ModuleType) -> None:
    method, detector, assistant = build(module), fake.FakeDetector(), adviser(module)
    student, teacher, batch = fake.taps(2, 1), fake.taps(2, 2), fake.batch(2)
    exact = fake.run(method, student, teacher, batch, detector, assistant)
    with torch.autocast("cpu", torch.bfloat16):
        rough = fake.run(method, student, teacher, batch, detector, assistant)
    for name, term in rough.items():
        torch.testing.assert_close(term.float(), exact[name], rtol=0.05, atol=1e-3)


@every_method
def test_only_declared_taps_are_read(module: ModuleType) -> None:
    method, teacher, detector, assistant = build(module), fake.taps(2, 2), fake.FakeDetector(), adviser(module)
    reads = method.reads
    assert bool(reads) == module.Config().taught
    assert reads <= {"c5", "pyramid"}
    declared = Taps(teacher.c5 if "c5" in reads else None, teacher.pyramid if "pyramid" in reads else ())
    student, batch = fake.taps(2, 1), fake.batch(2)
    found, whole = (fake.run(method, student, shown, batch, detector, assistant) for shown in (declared, teacher))
    assert found == whole


@pytest.mark.parametrize("name", [name for name, module in METHODS.items() if module.Config().sparse_suffices])
@pytest.mark.parametrize("boxes", ["usual", "tiny", "border", "all", "crowd"])
def test_sparse_suffices_means_that_other_positions_are_not_looked_at(name: str, boxes: str) -> None:
    """So a cache of the stored positions gives what the live teacher gives, whatever stands in place of the rest."""
    method, batch, student, teacher = build(METHODS[name]), odd_batch(boxes), fake.taps(2, 1), fake.taps(2, 2)
    kept = foreground_cells(batch.boxes, fake.CANVAS, fake.STRIDES, METHODS[name].Config().reads_within)
    pairs = zip(kept, teacher.pyramid, strict=True)
    stored = Taps(None, tuple(torch.where(held[:, None], x, torch.nan) for held, x in pairs))
    assert boxes == "all" or any(x.isnan().any() for x in stored.pyramid)
    live, cached = fake.run(method, student, teacher, batch), fake.run(method, student, stored, batch)
    assert cached == live
    assert live["feat"] > 0


@every_method
@pytest.mark.parametrize("boxes", ["tiny", "border", "all", "crowd"])
def test_odd_boxes_give_finite_terms_and_gradients(module: ModuleType, boxes: str) -> None:
    student, method = fake.require_grad(fake.taps(2, 1)), build(module)
    terms = fake.run(method, student, fake.taps(2, 2), odd_batch(boxes), assistant=adviser(module))
    torch.stack(list(terms.values())).sum().backward()
    assert all(term.isfinite() for term in terms.values())
    found = [*fake.tensors(student), *method.parameters()]
    assert all(x.grad is None or x.grad.isfinite().all() for x in found)


def odd_batch(boxes: str) -> Batch:
    """Two images, one of them with boxes of one pixel, at the border, over everything, or many over each other."""
    height, width = fake.CANVAS
    x, y = torch.meshgrid(torch.arange(0.0, 60, 6), torch.arange(0.0, 60, 6), indexing="ij")
    corners = torch.stack([x, y], dim=-1).reshape(-1, 2)
    found = {
        "usual": fake.batch(1).boxes[0],
        "tiny": torch.tensor([[9.0, 9.0, 10.0, 10.0], [15.5, 31.5, 16.5, 32.5], [40.0, 40.0, 40.0, 40.0]]),
        "border": torch.tensor(
            [[0.0, 0.0, 1.0, 1.0], [width - 1.0, height - 1.0, width, height], [width - 20.0, 0.0, width, height]]
        ),
        "all": torch.tensor([[0.0, 0.0, width, height]]),
        "crowd": torch.cat([corners, corners + 30], dim=1),
    }[boxes]
    usual, count = fake.batch(2, 0), float(len(found))
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    batch = replace(usual, boxes=(none[0], found), labels=(none[1], torch.zeros(len(found), dtype=torch.int64)))
    return batch.with_totals({name: torch.tensor(count) for name in usual.totals} | {"images": torch.tensor(2.0)})


@every_method
@pytest.mark.parametrize("wide", [False, True])
def test_shares_of_two_halves_sum_to_the_loss_of_the_whole(module: ModuleType, wide: bool) -> None:
    shapes = fake.wider() if wide else fake.SHAPES
    method = build(module, DIVISIBLE.get(short_name(module)), shapes)
    detector, teacher, assistant = fake.FakeDetector(), fake.taps(3, 2, shapes), adviser(module, teacher=shapes)

    def losses_and_gradients(parts: list[slice]) -> tuple[dict[str, float], list[Tensor]]:
        student = fake.require_grad(fake.taps(3, 1))
        method.zero_grad()
        sums: dict[str, float] = {}
        for part in parts:
            batch = fake.batch(len(range(3)[part]), totals=3, first=part.start)
            terms = fake.run(method, fake.rows(student, part), fake.rows(teacher, part), batch, detector, assistant)
            torch.stack(list(terms.values())).sum().backward()
            sums |= {name: sums.get(name, 0.0) + term.item() for name, term in terms.items()}
        found = [*fake.tensors(student), *(p for p in method.parameters() if p.requires_grad)]
        return sums, [x.grad.clone() for x in found if x.grad is not None]

    whole, halves = losses_and_gradients([slice(0, 3)]), losses_and_gradients([slice(0, 1), slice(1, 3)])
    assert halves[0] == pytest.approx(whole[0], rel=1e-4)
    torch.testing.assert_close(halves[1], whole[1], rtol=1e-3, atol=1e-5)


ASSISTED = {name: module for name, module in METHODS.items() if hasattr(module, "Assistant")}


@pytest.mark.parametrize("module", ASSISTED.values(), ids=ASSISTED.keys())
@pytest.mark.parametrize("boxes", [0, 2])
def test_an_assistants_shares_sum_to_its_loss_of_the_whole(module: ModuleType, boxes: int) -> None:
    """And so do their gradients: two ranks learn what one would."""
    detector, student, teacher = fake.FakeDetector(), fake.taps(3, 1), fake.taps(3, 2)
    assistant = adviser(module)
    assert assistant is not None
    parameters = [p for p in assistant.parameters() if p.requires_grad]

    def learnt(part: slice) -> tuple[float, list[Tensor]]:
        batch = fake.batch(len(range(3)[part]), boxes, totals=3, first=part.start)
        seen = fake.scene(fake.rows(student, part), fake.rows(teacher, part), batch, detector)
        loss = assistant.loss(assistant.advise(assistant.watch(seen), seen), seen)
        return loss.item(), list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))

    (whole, expected), (one, first), (other, second) = map(learnt, (slice(0, 3), slice(0, 1), slice(1, 3)))
    assert one + other == pytest.approx(whole, rel=1e-4)
    gap = torch.cat([(a + b - c).flatten() for a, b, c in zip(first, second, expected, strict=True)])
    assert gap.norm() < 1e-4 * torch.cat([x.flatten() for x in expected]).norm()


@every_taught_method
def test_the_loss_changes_when_the_teachers_images_are_shuffled(module: ModuleType) -> None:
    method, detector, batch, assistant = build(module), fake.FakeDetector(), fake.batch(3), adviser(module)
    student = fake.taps(3, 1)
    # A student near its teacher: for two unrelated ones a shuffle would be no worse.
    teacher = Taps(student.c5, tuple(x + 0.1 * torch.randn_like(x) for x in student.pyramid))
    right = imitation(fake.run(method, student, teacher, batch, detector, assistant))
    turned = fake.rows(teacher, [2, 0, 1])
    wrong = imitation(fake.run(method, student, turned, batch, detector, assistant))
    if short_name(module) in SYMMETRIC:
        assert wrong != pytest.approx(right, rel=1e-3)
    else:
        assert wrong > 1.5 * right


@every_method
def test_parameters_live_in_sub_modules(module: ModuleType) -> None:
    """ZeRO 3 gathers a parameter when the module that owns it is called, and `losses` is not a call."""
    assert list(build(module, teacher=fake.wider()).parameters(recurse=False)) == []


@every_taught_method
def test_pyramids_of_different_depth_are_refused(module: ModuleType) -> None:
    shapes = replace(fake.SHAPES, strides=(8, 16))
    maker = getattr(module, "Assistant", module.Loss)
    with pytest.raises(ValueError, match=r"strides \(8, 16, 32\).*\(8, 16\)"):
        maker(module.Config(), fake.pair(teacher=shapes))


@every_method
@pytest.mark.parametrize("kind", DETECTORS.values(), ids=DETECTORS.keys())
def test_a_doubled_teacher_teaches_a_student(kind: ModuleType, module: ModuleType) -> None:
    """The whole way with real detectors: features, alignment, assistant, losses, gradient to the backbone."""
    bins = {"bins": 8} if short_name(module) == "ld" and short_name(kind) != "faster_rcnn" else {}
    student, teacher = (tiny(kind, width=width, levels=(3, 4, 5, 6), **bins) for width in (32, 16))
    pair = fake.pair(student.shapes, replace(teacher.shapes, strides=student.shapes.strides))
    if short_name(module) == "ld" and not bins:
        with pytest.raises(ValueError, match="set bins to 16"):
            module.Loss(module.Config(), pair)
        return
    method = module.Loss(usual(module), pair)
    batch = fake.batch(2, canvas=(64, 96))
    batch = batch.with_totals({"images": torch.tensor(2.0), "boxes": torch.tensor(4.0)} | student.counts(batch))
    pixels = torch.randn(2, 3, 64, 96)
    taps = student.features(pixels)
    with torch.no_grad():
        doubled = teacher.features(F.interpolate(pixels, scale_factor=2.0))
    aligned = align(doubled, teacher.shapes, student.shapes, 2)
    check_grid(aligned, student.shapes, (64, 96))
    outputs = student.predict(taps.pyramid, batch.geometry, sampling=batch)
    advice = Advice(student, student.predict(taps.detach().pyramid, batch.geometry, outputs.proposals or None))
    if hasattr(module, "Assistant"):
        assistant = module.Assistant(usual(module), pair)
        seen = replace(fake.scene(taps, aligned, batch, student), proposals=outputs.proposals or None)
        advice = assistant.advise(assistant.watch(seen), seen).detach()
    if method.needs_head:
        head = teacher.on_grid(student.shapes.strides)
        told = head.predict(aligned.pyramid, batch.geometry, outputs.proposals or None)
        advice = replace(advice, ask=lambda: told.detach())
    terms = method.losses(taps, outputs, aligned, batch, advice)
    torch.stack(list(terms.values())).sum().backward()
    assert all(term.isfinite() for term in terms.values())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.backbone.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_fitnet_is_the_mean_squared_error_summed_over_levels() -> None:
    student, teacher = fake.taps(2, 1), fake.taps(2, 2)
    expected = 0.0
    for s, t in zip(student.pyramid, teacher.pyramid, strict=True):
        pairs = list(zip(s.double().flatten().tolist(), t.double().flatten().tolist(), strict=True))
        expected += sum((a - b) ** 2 for a, b in pairs) / len(pairs)
    found = fake.run(build(fitnet), student, teacher, fake.batch(2))["feat"]
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cwd_is_the_divergence_of_softened_planes(temperature: float) -> None:
    student, teacher = fake.taps(2, 1), fake.taps(2, 2)
    expected = 0.0
    for s, t in zip(student.pyramid, teacher.pyramid, strict=True):
        planes = list(zip(s.double().flatten(2).flatten(0, 1), t.double().flatten(2).flatten(0, 1), strict=True))
        for s_plane, t_plane in planes:
            p = [math.exp(x / temperature) for x in t_plane.tolist()]
            q = [math.exp(x / temperature) for x in s_plane.tolist()]
            kl = sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))
            expected += temperature**2 * kl / len(planes)
    method = build(cwd, cwd.Config(temperature=temperature))
    assert fake.run(method, student, teacher, fake.batch(2))["feat"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("statistics", ["batch", "image"])
def test_pkd_is_one_minus_pearsons_r(statistics: str) -> None:
    student, teacher = fake.taps(2, 1), fake.taps(2, 2)
    # A mean far from zero, as features have: raw sums of squares would lose the digits.
    student = Taps(student.c5, tuple(x + 30 for x in student.pyramid))
    expected = 0.0
    for s, t in zip(student.pyramid, teacher.pyramid, strict=True):
        channels = [(s[:, c], t[:, c]) for c in range(s.shape[1])]
        if statistics == "image":
            channels = [(a[i], b[i]) for a, b in channels for i in range(2)]
        r = [torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].item() for a, b in channels]
        expected += 10 * (1 - sum(r) / len(r))
    method = build(pkd, pkd.Config(statistics=statistics))  # pyright: ignore[reportArgumentType]
    assert fake.run(method, student, teacher, fake.batch(2))["feat"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("module", [cwd, pkd], ids=["cwd", "pkd"])
def test_a_constant_per_channel_changes_nothing(module: ModuleType) -> None:
    student, teacher, batch = fake.taps(2, 1), fake.taps(2, 2), fake.batch(2)
    moved = Taps(student.c5, tuple(x + torch.randn(1, x.shape[1], 1, 1) for x in student.pyramid))
    before, after = (fake.run(build(module), x, teacher, batch)["feat"].item() for x in (student, moved))
    assert after == pytest.approx(before, rel=1e-5)


def test_pkd_does_not_see_scale() -> None:
    teacher = fake.taps(2, 2)
    student = Taps(teacher.c5, tuple(7 * x - 3 for x in teacher.pyramid))
    assert fake.run(build(pkd), student, teacher, fake.batch(2))["feat"].item() == pytest.approx(0, abs=1e-4)


def test_pkd_of_a_dead_channel_is_finite_in_value_and_gradient() -> None:
    student = fake.require_grad(Taps(fake.taps(2, 1).c5, tuple(torch.zeros_like(x) for x in fake.taps(2, 1).pyramid)))
    loss = fake.run(build(pkd), student, fake.taps(2, 2), fake.batch(2))["feat"]
    loss.backward()
    assert loss.item() == pytest.approx(10 * len(fake.STRIDES) / 2, rel=1e-4)
    assert all(x.grad is not None and x.grad.isfinite().all() for x in student.pyramid)


def test_pkd_refuses_accumulation_with_batch_statistics() -> None:
    with pytest.raises(ValueError, match=r"4 accumulated.*pkd.statistics to image"):
        pkd.Loss(pkd.Config(), fake.pair(accumulate=4))
    pkd.Loss(pkd.Config(statistics="image"), fake.pair(accumulate=4))


@pytest.mark.parametrize(("family", "weight"), [("one_stage", 10.0), ("two_stage", 6.0)])
def test_pkd_weighs_by_family(family: str, weight: float) -> None:
    assert pkd.Loss(pkd.Config(), fake.pair(student=replace(fake.SHAPES, family=family))).alpha == weight


def _pkd_on_rank(rank: int, meeting: str, found: str) -> None:
    """One of two ranks: its half of the images, the sum of shares, its parameter gradient and its taps' gradient."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    part = (slice(0, 1), slice(1, 3))[rank]
    loss, gradients = _pkd_part(World(rank=rank, size=2), part)
    torch.save((loss, gradients), f"{found}.{rank}")
    torch.distributed.destroy_process_group()


def _pkd_on_spawned(_: int, meeting: str, found: str) -> None:
    _pkd_on_rank(1, meeting, found)


def _pkd_part(world: World, part: slice) -> tuple[float, tuple[list[Tensor], list[Tensor]]]:
    torch.manual_seed(0)
    method = pkd.Loss(pkd.Config(), fake.pair(teacher=fake.wider(), world=world))
    student = fake.require_grad(fake.rows(fake.taps(3, 1), part))
    teacher = fake.rows(fake.taps(3, 2, fake.wider()), part)
    loss = fake.run(method, student, teacher, fake.batch(len(range(3)[part]), totals=3))["feat"]
    loss.backward()
    weights = [p.grad for p in method.parameters() if p.grad is not None]
    return loss.item(), (weights, [x.grad for x in student.pyramid if x.grad is not None])


@pytest.mark.cluster
def test_pkd_over_two_ranks_is_pkd_over_the_whole_batch(tmp_path: Path) -> None:
    where = (f"{tmp_path}/meeting", f"{tmp_path}/found")
    # This process is the other rank: importing torch in a new one is most of the test's time.
    child = mp.spawn(_pkd_on_spawned, args=where, nprocs=1, join=False)  # pyright: ignore
    _pkd_on_rank(0, *where)
    assert child is not None
    assert child.join(60)
    (loss_0, (weights_0, taps_0)), (loss_1, (weights_1, taps_1)) = (torch.load(f"{where[1]}.{rank}") for rank in (0, 1))
    loss, (weights, taps) = _pkd_part(World(), slice(0, 3))
    assert loss_0 + loss_1 == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close([a + b for a, b in zip(weights_0, weights_1, strict=True)], weights)
    torch.testing.assert_close([torch.cat(both) for both in zip(taps_0, taps_1, strict=True)], taps)


@every_method
def test_a_methods_own_settings_leave_the_common_ones_their_meaning(module: ModuleType) -> None:
    """Another default of when or how strongly is a method's own business; another meaning would be a trap."""
    common = {field.name for field in fields(MethodConfig)}
    own = set(vars(module.Config)["__annotations__"])
    assert own & common <= {"weight", "start", "ramp", "stop", "freeze"}
