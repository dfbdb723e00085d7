"""HMKD ("Hierarchical matching knowledge distillation" for small objects, JCST 2024): the deeper of two neighbouring
levels of the teacher finds the small objects (Inquiry Head), a decoder asked about them attends to the finer level, and
the student's values there equal the teacher's (L_small); larger objects are imitated cell by cell (L_others), and the
whole map through global context blocks (L_background). Reads the teacher's pyramid.

Inquiry Head and decoders are one assistant. Departures and readings, by ambiguity (A2.8): the second L_small, with
attention over values, is used, `small.use_mk` adds the first (H3); sums over channels, cells, heads and objects where
the weights of 0.001 ask for them, a mean over channels in L_background (H8); the smallest box wins where boxes overlap
(H4); one pair of levels (H5); DETR's learning rate and decay (H7); FGD's difference of two blocks (H9); the head is on
the teacher (H10); original pixels (H11); ICD's decoder loss (H12) and gates. A small object always has the cell that
holds its centre. Projections and context blocks are stepped by the student's optimizer.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.adapt import MatchChannels, same_levels
from kd.blocks.decoder import DecoderConfig, InstanceDecoder, adamw
from kd.blocks.divergence import squared_error
from kd.blocks.foreground import all_boxes, cover
from kd.blocks.gcblock import ContextError
from kd.blocks.inquiry import Asking, Inquiries, ask
from kd.blocks.inquiry_head import InquiryConfig, InquiryHead, SmallObjects, small_objects
from kd.blocks.instance_values import StudentValues, own_share, value_error
from kd.blocks.level_pairs import Start, level_pairs
from kd.methods import base
from kd.methods.base import Advice, Method, MethodConfig, Pair, Scene


@dataclass(frozen=True, kw_only=True)
class Small:
    """What a small object is, and how it is imitated."""

    side: float = 32.0
    """Objects of a smaller area than its square are small."""
    pixels: Literal["original", "resized"] = "original"
    """Whose pixels the area is measured in: the annotation's, as AP_small does, or the canvas's."""
    reduce: Literal["sum", "mean"] = "sum"
    """Over heads and objects of an image; `mean` is the printed 1 / (N_m N_s), which needs a far larger beta."""
    use_mk: bool = False
    """Multiply the attention by M K H W: only within the object's box, less where a smaller one overlaps it."""
    values: Literal["own", "shared"] = "own"
    """Whether the student's values have a projection of their own or go through the teacher's."""

    def __post_init__(self) -> None:
        if self.side <= 0:
            raise ValueError(f"small.side must be > 0, got {self.side}")


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    late: ClassVar[frozenset[str]] = MethodConfig.late | {"alpha", "beta"}
    start: float = 1_000 / 90_000
    """The assistant learns alone for the first 1,000 of 90,000 iterations, as ICD's."""
    alpha: float = 1e-3
    """Weight of L_background."""
    beta: float = 1e-3
    """Weight of L_small and L_others."""
    start_layer: int | None = None
    """The level that inquires (the next finer one answers); None: the second finest, P3 where there is a P2."""
    start_is: Start = "inquiry"
    """`key`: the start layer answers instead, and the next deeper one inquires."""
    pairs: tuple[tuple[int, int], ...] = ()
    """(inquiring level, answering level), such as ((3, 2), (4, 3)), instead of the start layer's one pair."""
    absdiff: bool = False
    """L_background is one context block of |F^T - F^S|, as printed, instead of the difference of two."""
    small: Small = Small()
    inquiry: InquiryConfig = field(default_factory=InquiryConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights("alpha", "beta")

    @property
    def assisted(self) -> bool:
        return self.beta > 0

    def levels(self, strides: tuple[int, ...]) -> list[tuple[int, int]]:
        """(inquiring, answering) places in the pyramid."""
        return level_pairs(strides, self.pairs, self.start_layer, self.start_is)


class Loss(Method):
    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        levels = same_levels(pair.student.strides, pair.teacher.strides)
        self.config, self.strides, self.pairs = config, pair.student.strides, config.levels(pair.student.strides)
        mine, its = pair.student.pyramid_channels, pair.teacher.pyramid_channels
        width, kind = config.decoder.width, config.small.values
        self.match = MatchChannels(mine, its, levels) if config.alpha or config.beta else None
        self.project = nn.ModuleList(
            StudentValues(kind, mine, its, width, 1) for _ in (self.pairs if config.beta else ())
        )
        self.context = ContextError(its, levels, config.absdiff) if config.alpha else None
        settings = config.inquiry
        self.head = InquiryHead(mine, settings) if settings.student else None

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        config, images = self.config, batch.totals["images"].clamp(min=1)
        terms: dict[str, Tensor] = {}
        objects = _small_objects(config, batch)
        if self.match is not None:
            pairs = list(zip(self.match(student.pyramid), teacher.detach().pyramid, strict=True))
            if config.beta:
                terms["small"] = config.beta * self._small(student, advice) / images
                terms["others"] = config.beta * self._others(pairs, objects, batch) / images
            if self.context is not None:
                terms["background"] = config.alpha * self.context(*zip(*pairs, strict=True)) / images
        if self.head is not None:
            settings, asking = config.inquiry, sorted({inquiring for inquiring, _ in self.pairs})
            found = [objects.focal(self.head(student.pyramid[i]), self.strides[i], settings).sum() for i in asking]
            terms["inquiry"] = settings.student * torch.stack(found).sum() / images
        return terms

    def _small(self, student: Taps, advice: Advice) -> Tensor:
        """Sum over images of the squared differences of values under the decoder's attention."""
        if not advice.notes:
            raise ValueError("hmkd's loss on small objects needs its assistant's attention; or set beta to 0")
        found = []
        for i, ((_, key), project) in enumerate(zip(self.pairs, self.project, strict=True)):
            attention, values, weight, bias = (advice.notes[f"{name}{i}"] for name in NOTES)
            mine = project((student.pyramid[key],), weight, bias)
            found.append((attention * value_error(mine, values, self.config.decoder.heads)).sum())
        return torch.stack(found).sum()

    def _others(self, pairs: list[tuple[Tensor, Tensor]], objects: SmallObjects, batch: Batch) -> Tensor:
        """Sum over cells, channels and images of M K d^2, of small objects only on levels that no decoder looks at."""
        boxes, image = all_boxes(batch)
        large = ~torch.cat([mask[: len(b)] for mask, b in zip(objects.small, batch.boxes, strict=True)])
        answering = {key for _, key in self.pairs}
        found = []
        for level, ((s, t), stride) in enumerate(zip(pairs, self.strides, strict=True)):
            chosen = large if level in answering else torch.ones_like(large)
            covered = cover(boxes[chosen], image[chosen], (len(s), s.shape[2], s.shape[3]), stride)
            found.append((covered.greatest(1 / covered.cells)[:, None] * squared_error(s, t)).sum())
        return torch.stack(found).sum()


NOTES = ("attention", "values", "weight", "bias")
"""What the assistant says of each pair of levels."""


class Assistant(base.Assistant):
    """Inquiry Head and decoders."""

    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        same_levels(pair.student.strides, pair.teacher.strides)
        self.config, self.clip, self.strides = config, config.decoder.clip, pair.student.strides
        self.pairs = config.levels(pair.student.strides)
        channels, classes = pair.teacher.pyramid_channels, pair.student.num_classes
        self.head = InquiryHead(channels, config.inquiry)
        self.decoders = nn.ModuleList(InstanceDecoder(channels, classes, config.decoder) for _ in self.pairs)
        self.most = config.decoder.most_of(pair.student.family)
        self.classes = classes

    def rate(self, progress: float) -> float:
        return self.config.decoder.rate(progress)

    def watch(self, scene: Scene) -> tuple[Tensor, ...]:
        pyramid, settings = scene.teacher.pyramid, self.config.inquiry
        objects = _small_objects(self.config, scene.batch)
        logits = {i: self.head(pyramid[i]) for i in sorted({inquiring for inquiring, _ in self.pairs})}
        erred = [objects.focal(x, self.strides[i], settings) for i, x in logits.items()]
        erred = [settings.weight * x for x in erred]
        found: list[Tensor] = []
        for number, ((inquiring, key), decoder) in enumerate(zip(self.pairs, self.decoders, strict=True)):
            assert isinstance(decoder, InstanceDecoder)
            chosen, hot = objects.candidates(logits[inquiring].detach(), self.strides[inquiring], settings, self.most)
            asked = ask(scene.batch, self._asking(number), chosen, hot)
            stride, level = self.strides[key], pyramid[key]
            attention, values, lost = decoder.look(asked, (level,), (stride,), scene.batch.geometry)
            erred.append(lost)
            found += [self._weight(attention, asked, scene.batch, level, stride), values]
            # Copies: the step that follows must not change what these values were made with.
            found += [decoder.value.weight.clone(), decoder.value.get_parameter("bias").clone()]
        return torch.stack(erred).sum(dim=0), *found

    def advise(self, made: tuple[Tensor, ...], scene: Scene) -> Advice:
        names = [f"{name}{i}" for i in range(len(self.pairs)) for name in NOTES]
        return Advice(scene.student, notes=dict(zip(["erred", *names], made, strict=True)))

    def loss(self, advice: Advice, scene: Scene) -> Tensor:
        return advice.notes["erred"].sum() / scene.batch.totals["images"].clamp(min=1)

    def optimizer(self) -> torch.optim.Optimizer:
        return adamw(self.config.decoder, self)

    def _asking(self, number: int) -> Asking:
        decoder = self.config.decoder
        return Asking(
            classes=self.classes, fakes=decoder.fakes, most=self.most, jitter=decoder.jitter,
            purpose=f"hmkd{number}", largest=self.config.small.side,
        )  # fmt: skip

    def _weight(self, attention: Tensor, asked: Inquiries, batch: Batch, level: Tensor, stride: int) -> Tensor:
        """(B, M, Q, U) attention -> (B, M, U) what each cell's difference counts."""
        attention = attention * asked.real[:, None, :, None]
        if self.config.small.use_mk:
            attention = attention * own_share(asked.boxes, batch, level, stride)[:, None]
        total = attention.sum(dim=2)
        if self.config.small.reduce == "sum":
            return total
        return total / (total.shape[1] * asked.real.sum(dim=1).clamp(min=1))[:, None, None]


def _small_objects(config: Config, batch: Batch) -> SmallObjects:
    return small_objects(batch, config.small.side, config.small.pixels == "original", config.inquiry.radius)
