import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet18
from torchvision.ops import FrozenBatchNorm2d

from kd.backbones import base, mobilenetv2, resnet
from kd.plugins import plugin, plugin_names, plugins

PRETRAINED = Path(__file__).parents[2] / "../shared/data/weights/mobilenet_v2-b0353104.pth"


@pytest.mark.parametrize("name", plugin_names("kd.backbones"))
@pytest.mark.parametrize("size", [(64, 96), (65, 97)])
def test_stages_have_the_promised_channels_and_ceil_sizes(name: str, size: tuple[int, int]) -> None:
    module = plugin("kd.backbones", name)
    backbone = module.build(module.Config(norm="group"))
    stages = backbone(torch.rand(1, 3, *size))
    assert tuple(s.shape[1] for s in stages) == backbone.channels
    for stage, stride in zip(stages, backbone.strides, strict=True):
        assert tuple(stage.shape[-2:]) == (-(-size[0] // stride), -(-size[1] // stride))


@pytest.mark.parametrize("name", plugin_names("kd.backbones"))
def test_the_name_is_the_file(name: str) -> None:
    assert plugins("kd.backbones")[name].Config().name == name


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_resnet_channels(depth: int) -> None:
    with torch.device("meta"):
        backbone = resnet.build(resnet.Config(depth=depth, norm="batch"))  # pyright: ignore[reportArgumentType]
    assert backbone.channels == ((64, 128, 256, 512) if depth < 50 else (256, 512, 1024, 2048))


def test_our_mobilenet_with_real_weights_computes_what_torchvisions_does() -> None:
    if not PRETRAINED.exists():
        pytest.skip(f"needs torchvision's weights at {PRETRAINED}")
    theirs = mobilenet_v2()
    theirs.load_state_dict(torch.load(PRETRAINED, weights_only=True))
    images = torch.randn(1, 3, 64, 64)
    for norm in ("frozen", "batch"):
        ours = mobilenetv2.build(mobilenetv2.Config(norm=norm, weights=str(PRETRAINED))).eval()  # pyright: ignore
        with torch.no_grad():
            torch.testing.assert_close(ours(images)[-1], theirs.eval().features[:18](images), rtol=1e-4, atol=1e-5)
        assert ours.channels == (24, 32, 96, 320)


def test_resnet_reads_torchvisions_names_from_both_formats(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    theirs = resnet18().eval()
    torch.save(theirs.state_dict(), tmp_path / "r.pth")
    save_file(theirs.state_dict(), tmp_path / "r.safetensors")
    images = torch.randn(1, 3, 64, 64)
    c5 = nn.Sequential(*list(theirs.children())[:-2])(images)
    for file in ("r.pth", "r.safetensors"):
        ours = resnet.build(resnet.Config(depth=18, norm="frozen", weights=str(tmp_path / file)))
        torch.testing.assert_close(ours(images)[-1], c5, rtol=1e-4, atol=1e-4)


def _state(tmp_path: Path, change: dict[str, Tensor | None]) -> str:
    state = resnet18(num_classes=1).state_dict() | change
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / "w.pth")
    return str(tmp_path / "w.pth")


def test_weights_that_do_not_fit_are_named_all_at_once(tmp_path: Path) -> None:
    change = {"bn1.bias": None, "head.x": torch.zeros(1), "conv1.weight": torch.zeros(8, 3, 7, 7)}
    config = resnet.Config(depth=18, norm="frozen", weights=_state(tmp_path, change))
    with pytest.raises(ValueError, match=r"missing: bn1.bias; unexpected: head.x; shape: conv1.weight \(8, 3, 7, 7\)"):
        resnet.build(config)


def test_what_cannot_work_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set weights to a file"):
        resnet.build(resnet.Config(norm="frozen"))
    with pytest.raises(ValueError, match="use norm 'frozen' or 'batch' with weights"):
        resnet.Config(norm="group", weights="x.pth")
    with pytest.raises(FileNotFoundError, match="give the path"):
        resnet.build(resnet.Config(norm="batch", weights=str(tmp_path / "none.pth")))
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no plain state dict"):
        resnet.build(resnet.Config(norm="batch", weights=str(tmp_path / "list.pth")))
    with pytest.raises(ValueError, match="width_mult"):
        mobilenetv2.Config(width_mult=0)


def test_train_does_not_unfreeze_a_frozen_norm(tmp_path: Path) -> None:
    backbone = resnet.build(resnet.Config(depth=18, norm="frozen", weights=_state(tmp_path, {})))
    images = torch.randn(2, 3, 32, 32)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    still = backbone.eval()(images)[-1]
    moving = backbone.train()(images)[-1]
    assert torch.equal(still, moving)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert all(not list(m.parameters()) for m in backbone.modules() if isinstance(m, FrozenBatchNorm2d))


def test_group_norm_serves_any_channel_count_and_forgets_no_small_map() -> None:
    for channels in (1, 8, 24, 30, 37, 320):
        norm = base.norm_layer("group")(channels)
        assert norm(torch.rand(2, channels, 2, 2)).shape == (2, channels, 2, 2)
    x = torch.randn(1, 8, 1, 1)
    assert base.norm_layer("group")(8)(x).abs().sum() > 0


def test_evaluating_gives_every_part_its_own_mode_back() -> None:
    module = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2).eval()).train()
    module[1].eval()
    with base.evaluating(module):
        assert not any(m.training for m in module.modules())
    assert [m.training for m in module.modules()] == [True, True, False]


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("name", plugin_names("kd.backbones"))
def test_recomputing_changes_no_bit_and_keeps_less(name: str, norm: base.Norm) -> None:
    """Neither the stages nor a gradient nor a running statistic, which sees each batch once."""
    module, images = plugin("kd.backbones", name), torch.randn(2, 3, 64, 64)
    torch.manual_seed(3)
    plain = module.build(module.Config(norm=norm)).train()
    again = copy.deepcopy(plain)
    again.recompute = True
    kept = [_trained_once(backbone, images) for backbone in (plain, again)]
    assert kept[1] < 0.5 * kept[0]
    for backbone in (plain, again):
        assert all(p.grad is not None for p in backbone.parameters())
    pairs = zip(plain.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
    moved, same = plain.state_dict(), again.state_dict()
    assert all(torch.equal(value, same[key]) for key, value in moved.items())
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(plain(images), again(images), strict=True))


def _trained_once(backbone: base.Backbone, images: Tensor) -> int:
    """Forward and backward of all stages; the bytes that autograd kept between the two."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = torch.stack([stage.square().mean() for stage in backbone(images)]).sum()
    loss.backward()
    return sum(kept.values())


def test_a_frozen_backbone_has_nothing_to_recompute() -> None:
    backbone = mobilenetv2.build(mobilenetv2.Config(norm="batch")).train()
    backbone.recompute = True
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    with torch.no_grad(), base.evaluating(backbone):
        backbone(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
