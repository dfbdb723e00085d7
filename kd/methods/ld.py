"""LD (Zheng et al., CVPR 2022, arXiv:2102.12252): where the sides of a box are distributions, these are
distilled as classes are, so that the student learns where the teacher is unsure. Asks the teacher's head; reads its
pyramid.

T^2 times the divergence, the mean over a box's four sides, on the places that answer for an object (main) and on those
near it that do not (VLR: 0.25 to 1 times ATSS's threshold in DIoU, weighted by IoU); and that of the classes on the
main places. Sums are divided by the positives. Student and teacher need the setting `bins`.

Departures: places are the detector's own (GFL has ATSS's); around FCOS's locations stand ATSS's squares of 8 strides.
As in the authors' code: the VLR counts a quarter, class divergences are means over the classes.
"""

from dataclasses import dataclass

from torch import Tensor

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.answers import Answers
from kd.blocks.divergence import softened_kl
from kd.blocks.foreground import all_boxes
from kd.blocks.valuable import valuable
from kd.methods.base import Advice, Method, MethodConfig, Pair, check_comparable


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    main: float | None = None
    """Weight of the sides on places that answer for an object; None: the authors', 5 of RetinaNet, else 0.25."""
    vlr: float = 0.25
    """Weight of the sides on places near objects."""
    cls: float = 10.0
    """Weight of the classes."""
    temperature: float = 10.0
    """Of the sides."""
    cls_temperature: float | None = None
    """None: the authors', 8 of RetinaNet, else 2."""
    low: float = 0.25
    """Share of the threshold at which the region near an object begins."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights("main", "vlr", "cls")
        self.check_positive("temperature", "cls_temperature")
        if not 0 <= self.low < 1:
            raise ValueError(f"low must be in [0, 1), got {self.low}")


class Loss(Method):
    needs_head = True

    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        for who, shapes in (("student", pair.student), ("teacher", pair.teacher)):
            if shapes.bins is None:
                raise ValueError(
                    f"ld needs boxes whose sides are distributions, which the {who}'s head does not have; set bins to "
                    "16 in the settings of an fcos or retinanet, and train the teacher with it too"
                )
        check_comparable(pair, "ld")
        retinanet = "retinanet" in pair.student.places
        self.main = (5.0 if retinanet else 0.25) if config.main is None else config.main
        usual = 8.0 if retinanet else 2.0
        self.cls_temperature = usual if config.cls_temperature is None else config.cls_temperature
        self.config = config

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        mine = advice.detector.answers(outputs, batch)
        its = advice.detector.answers(advice.teacher_outputs, batch)
        assert mine.edges is not None
        assert its.edges is not None
        on, near = mine.positive, _near(mine, batch, self.config.low)
        somewhere = on | (near > 0)
        sides = softened_kl(mine.edges[somewhere], its.edges[somewhere].detach(), self.config.temperature, dim=-1)
        weight = self.main * on + self.config.vlr / 4 * near
        logits, wanted = mine.logits[on], its.logits[on].detach()
        classes = softened_kl(logits, wanted, self.cls_temperature, dim=1) / logits.shape[1]
        return {
            "box": (sides.mean(dim=1) * weight[somewhere]).sum() * mine.share,
            "cls": self.config.cls * classes.sum() * mine.share,
        }


def _near(answers: Answers, batch: Batch, low: float) -> Tensor:
    """(N,): the weight of a place near an object that answers for none, else 0."""
    places = answers.places.unflatten(0, (len(batch), -1))[0]
    near = valuable(places, answers.lengths, *all_boxes(batch), len(batch), low).flatten()
    return near * (answers.allowed & ~answers.positive)
