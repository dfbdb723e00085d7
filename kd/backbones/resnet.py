"""ResNet (He et al., CVPR 2016, arXiv:1512.03385), torchvision's."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torchvision.models.resnet import ResNet, resnet18, resnet34, resnet50, resnet101

from kd.backbones.base import Backbone, BackboneConfig, initialise, norm_layer


@dataclass(frozen=True, kw_only=True)
class Config(BackboneConfig):
    """Settings of a ResNet."""

    name: Literal["resnet"] = "resnet"
    depth: Literal[18, 34, 50, 101] = 50


class ResNetBackbone(Backbone):
    """The four stages of a torchvision ResNet, under the same parameter names."""

    def __init__(self, whole: ResNet) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu, self.maxpool = whole.conv1, whole.bn1, whole.relu, whole.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = whole.layer1, whole.layer2, whole.layer3, whole.layer4
        c5 = whole.fc.in_features
        self.channels = (c5 // 8, c5 // 4, c5 // 2, c5)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `Backbone.forward`."""
        c2 = self.through(self.layer1, self.maxpool(self.relu(self.bn1(self.conv1(images)))))
        c3 = self.through(self.layer2, c2)
        c4 = self.through(self.layer3, c3)
        return c2, c3, c4, self.through(self.layer4, c4)


def build(config: Config, weights_follow: bool = False) -> Backbone:
    """A new backbone. With `weights_follow` the caller loads a whole detector's weights next, so the backbone's own
    are neither read nor asked for."""
    make = {18: resnet18, 34: resnet34, 50: resnet50, 101: resnet101}
    backbone = ResNetBackbone(make[config.depth](norm_layer=norm_layer(config.norm), num_classes=1))
    if not weights_follow:
        initialise(backbone, config, ignored=("fc.",))
    return backbone
