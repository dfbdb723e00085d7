"""Who is trained and how, in the HIT-UAV table: its settings by size."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from data_sharding.views import ViewConfig
from kd.backbones import mobilenetv2
from kd.detectors import fcos
from kd.methods import fitnet, pkd, scalekd
from kd.methods.base import MethodConfig
from kd.optimise import OptimConfig
from kd.plugins import plugin


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Everything that a size decides. Views are the student's; the teacher sees the same at twice the pixels."""

    views: ViewConfig
    evaluation: ViewConfig
    student: fcos.Config
    teacher: fcos.Config
    """One level coarser than the student: at twice the pixels, its cells and the objects that each answers for are
    then exactly the student's."""
    student_optim: OptimConfig
    teacher_optim: OptimConfig
    methods: Mapping[str, Mapping[str, MethodConfig]]
    """By the name of the row: which methods, with which settings."""
    device: str
    clock: str
    """What `plain_equal_time` equals: `seconds`, or `cpu_seconds` where other programs share the processor."""


def presets(weights: str) -> dict[str, Preset]:
    """The sizes by name. `weights`: ImageNet weights of torchvision's MobileNetV2."""
    backbone = mobilenetv2.Config(norm="frozen", weights=weights)
    optim = OptimConfig(
        optimizer="adamw", lr=1e-3, backbone_lr=0.25, weight_decay=0.05, batch=16, warmup=50,
        schedule="flat_cosine", flat=0.75, clip_norm=10.0,
    )  # fmt: skip
    small = fcos.Config(backbone=backbone, width=32, head_depth=2, levels=(2, 3, 4))
    full = fcos.Config(backbone=backbone, width=96, head_depth=2, levels=(2, 3, 4, 5))
    whole = ViewConfig(count=2, short_side=(256,), long_side=320, flip=0.5, buckets=((256, 384),))
    plain = replace(whole, count=1, flip=0.0)
    csa = scalekd.Csa(heads=2, rates=((2, 1), (1, 1), (1, 1)), learning_rate=3e-3, refresh=False)
    # Small objects have cells on P2 to P4, not on C5; and the output terms, whose gradients are as large as the task's
    # where their values are a few per cent of it, at a tenth of the paper's weights.
    on_pyramid = scalekd.Config(
        start=0.0, freeze=0.0, alpha=2.5e-3, beta=0.02, gamma=0.005, csa=csa,
        sdf=scalekd.Sdf(on="pyramid", width=64, token_width=64),
    )  # fmt: skip
    return {
        "cpu": Preset(
            # Tiles of the sensor's 256 x 256 px, three of four on an object: cheap steps that are full of objects.
            views=ViewConfig(count=6, crop=(256, 256), short_side=(128,), flip=0.5, buckets=((128, 128),)),
            evaluation=plain,
            student=small,
            teacher=replace(small, width=64, levels=(3, 4, 5)),
            student_optim=replace(optim, steps=600),
            teacher_optim=replace(optim, steps=800),
            # Weights that make the feature terms a fifth to a whole of the task loss, found on another seed in half
            # as many steps: FitNet's and PKD's own (2 and 10) are several times the task loss here. CSA has 600
            # steps to learn in, not 90k, and a pyramid of 32 channels.
            methods={
                "fitnet": {"fitnet": fitnet.Config(weight=0.1)},
                "pkd": {"pkd": pkd.Config(alpha=2.0)},
                "scalekd": {"scalekd": scalekd.Config(freeze=0.0, csa=csa, sdf=scalekd.Sdf(same_start=False))},
                "scalekd_pyramid": {"scalekd": on_pyramid},
            },
            device="cpu",
            clock="cpu_seconds",
        ),
        "gpu": Preset(
            views=whole,
            evaluation=plain,
            student=full,
            teacher=replace(full, width=128, head_depth=4, levels=(3, 4, 5, 6)),
            student_optim=replace(optim, lr=1e-3, steps=3000, warmup=200),
            teacher_optim=replace(optim, lr=1e-3, steps=3000, warmup=200),
            methods={name: {name: plugin("kd.methods", name).Config()} for name in ("fitnet", "pkd", "scalekd")},
            device="cuda",
            clock="seconds",
        ),
    }


def doubled(views: ViewConfig) -> ViewConfig:
    """The same views at twice the pixels."""
    return replace(
        views,
        short_side=None if views.short_side is None else tuple(2 * side for side in views.short_side),
        long_side=2 * views.long_side,
        buckets=tuple((2 * height, 2 * width) for height, width in views.buckets),
    )
