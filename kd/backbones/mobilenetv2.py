"""MobileNetV2 (Sandler et al., CVPR 2018, arXiv:1801.04381), torchvision's without the last 1 x 1 convolution.

That convolution (320 -> 1280 channels) serves the ImageNet classifier; a pyramid would throw its width away at once.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torchvision.models.mobilenetv2 import MobileNetV2

from kd.backbones.base import Backbone, BackboneConfig, initialise, norm_layer

# The last block of each stage, as index into torchvision's `features`: what follows it halves the map.
_STAGE_ENDS = (3, 6, 13, 17)


@dataclass(frozen=True, kw_only=True)
class Config(BackboneConfig):
    """Settings of a MobileNetV2."""

    name: Literal["mobilenetv2"] = "mobilenetv2"
    width_mult: float = 1.0
    """Multiplies every channel count, which is then rounded to a multiple of 8."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.width_mult <= 4:
            raise ValueError(f"width_mult must be in (0, 4], got {self.width_mult}; MobileNetV2's own is 1.0")


class MobileNetV2Backbone(Backbone):
    """The four stages of a torchvision MobileNetV2, under the same parameter names."""

    def __init__(self, whole: MobileNetV2) -> None:
        super().__init__()
        self.features = nn.Sequential(*list(whole.features)[: _STAGE_ENDS[-1] + 1])
        self.channels = tuple(self.features[end].out_channels for end in _STAGE_ENDS)  # pyright: ignore

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `Backbone.forward`."""
        stages = []
        x = images
        for index, block in enumerate(self.features):
            x = self.through((block,), x)
            if index in _STAGE_ENDS:
                stages.append(x)
        c2, c3, c4, c5 = stages
        return c2, c3, c4, c5


def build(config: Config, weights_follow: bool = False) -> Backbone:
    """A new backbone. With `weights_follow` the caller loads a whole detector's weights next, so the backbone's own
    are neither read nor asked for."""
    whole = MobileNetV2(num_classes=1, width_mult=config.width_mult, norm_layer=norm_layer(config.norm))
    backbone = MobileNetV2Backbone(whole)
    if not weights_follow:
        initialise(backbone, config, ignored=("classifier.", f"features.{_STAGE_ENDS[-1] + 1}."))
    return backbone
