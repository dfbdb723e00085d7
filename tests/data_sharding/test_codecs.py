import numpy as np
import pytest
import torch
from torch import Tensor

from data_sharding.codecs.catalogue import CHOICES, CODECS, CodecError, Encoded, codec, decode, stack, tap_bytes

SHAPES = [(3, 1, 1), (5, 4, 7), (1, 2, 3)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some(shape: tuple[int, ...], share: float = 0.4, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def error_bound(name: str, x: Tensor) -> Tensor:
    """What a codec may err by, value by value: half a step of its scale, which float16 rounds up."""
    if not name.endswith(("channel", "position")):
        return x.abs() * 2**-11
    dims = (1, 2) if name.endswith("channel") else 0
    return (x.abs().amax(dims, keepdim=True) / 127 * (1 + 2**-10) + 2**-24) / 2


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_tap_comes_back_within_the_codecs_precision_with_channels_last(
    name: str, shape: tuple[int, int, int]
) -> None:
    x, everywhere = noise(*shape) * 3, torch.ones(shape[1:], dtype=torch.bool)
    encoded = codec(name).encode(x, everywhere, level="p3")
    back = decode(encoded, name, shape, level="p3")
    cells = shape[1] * shape[2]
    assert encoded.rows == cells
    parts = (encoded.payload, encoded.scale, encoded.mask)
    assert sum(map(len, parts)) == tap_bytes(codec(name), shape[0], cells, cells)
    assert back.shape == x.shape
    assert back.dtype == torch.float32
    assert back.permute(1, 2, 0).is_contiguous()
    assert ((back - x).abs() <= error_bound(name, x) * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", ["int8_channel", "int8_position"])
@pytest.mark.parametrize("power", [-30, -20, 0, 20])
def test_no_value_is_cut_however_small_or_large(name: str, power: int) -> None:
    """At 2^-30 the scale is the smallest float16 there is; at 2^20 no float16 holds the values themselves."""
    x = noise(6, 5, 9) * 2.0**power
    back = decode(codec(name).encode(x, level="p3"), name, (6, 5, 9), level="p3")
    assert ((back - x).abs() <= error_bound(name, x) * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", ["int8_channel", "int8_position"])
def test_zeros_stay_zeros(name: str) -> None:
    x = noise(4, 3, 5)
    x[2], x[:, 1, 3] = 0, 0
    back = decode(codec(name).encode(x, level="p3"), name, (4, 3, 5), level="p3")
    assert (back[2] == 0).all()
    assert (back[:, 1, 3] == 0).all()
    assert torch.isfinite(back).all()


@pytest.mark.parametrize("per", ["channel", "position"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_sparse_is_dense_int8_of_the_masked_map(per: str, share: float) -> None:
    """Inside the mask the very values that the dense codec gives, outside zeros; also with no position at all."""
    shape = (7, 6, 5)
    x, mask = noise(*shape), some(shape[1:], share)
    sparse = codec(f"sparse_{per}").encode(x, mask, level="p3")
    assert sparse.rows == int(mask.sum())
    assert (sparse.rows > 0) == (share > 0)
    found = decode(sparse, f"sparse_{per}", shape, level="p3")
    masked = x * mask
    assert torch.equal(found, decode(codec(f"int8_{per}").encode(masked, level="p3"), f"int8_{per}", shape, level="p3"))
    assert (found[:, ~mask] == 0).all()
    if per == "position":
        whole = decode(codec("int8_position").encode(x, level="p3"), "int8_position", shape, level="p3")
        assert torch.equal(found[:, mask], whole[:, mask])


@pytest.mark.parametrize("name", CODECS)
def test_a_batch_decodes_to_what_each_image_does_alone(name: str) -> None:
    shape = (3, 4, 6)
    masks = [some(shape[1:], share, seed) for seed, share in enumerate((0.5, 0.0, 0.9))]
    alone = [codec(name).encode(noise(*shape, seed=i), m, level="p4") for i, m in enumerate(masks)]
    stored = stack(codec(name), alone, shape, level="p4")
    assert len(stored.values) == sum(one.rows for one in alone)
    assert stored.values.dtype == codec(name).dtype
    (maps,) = stored.to(torch.device("cpu")).maps()
    assert maps.shape == (3, *shape)
    assert maps.is_contiguous(memory_format=torch.channels_last)
    for found, one in zip(maps, alone, strict=True):
        assert torch.equal(found, decode(one, name, shape, level="p4"))
    assert torch.equal(stored.maps(torch.bfloat16)[0], maps.bfloat16())


def test_fp32_is_exact_for_every_kind_of_number() -> None:
    x = torch.tensor([0.0, -0.0, 1e-45, -3.4e38, 1 / 3, 65504.0]).view(2, 1, 3)
    back = decode(codec("fp32").encode(x, level="p3"), "fp32", (2, 1, 3), level="p3")
    assert back.contiguous().numpy().tobytes() == x.numpy().tobytes()


@pytest.mark.parametrize("name", CODECS)
def test_a_tap_in_any_memory_layout_and_float_type_gives_the_same_bytes(name: str) -> None:
    x, mask = torch.rand(4, 3, 5).half(), some((3, 5))
    expected = codec(name).encode(x, mask, level="p3")
    last = x[None].contiguous(memory_format=torch.channels_last)[0]
    for same in (last, x.double(), x.float()):
        found = codec(name).encode(same, mask, level="p3")
        for part in ("payload", "scale", "mask"):
            assert bytes(getattr(found, part)) == bytes(getattr(expected, part))
    if name == "fp16":
        assert np.frombuffer(expected.payload, np.float16)[:4].tolist() == x[:, 0, 0].tolist()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("fp16", 70000.0, "1 of 8 values do not fit codec fp16 .largest 70000, limit 65504"),
        ("fp16", float("inf"), "1 of 8 values are already NaN or infinite"),
        ("fp32", float("nan"), "1 of 8 values are already NaN or infinite"),
        ("int8_channel", float("nan"), "1 of 8 values are already NaN or infinite"),
        ("int8_position", float("inf"), "1 of 8 values are already NaN or infinite"),
        ("int8_channel", 1e7, "1 of 2 scales do not fit codec int8_channel .largest value 1e.07, limit 8.31901e.06"),
        ("int8_position", -1e7, "1 of 4 scales do not fit codec int8_position .*store this tap with codec fp32"),
    ],
)
def test_what_cannot_be_stored_is_an_error_that_names_the_level(name: str, value: float, told: str) -> None:
    x = torch.zeros(2, 2, 2)
    x[1, 0, 1] = value
    with pytest.raises(CodecError, match=f"'p5': {told}"):
        codec(name).encode(x, level="p5")


def test_wrong_shapes_and_lengths_are_errors() -> None:
    with pytest.raises(CodecError, match=r"expected \(C, h, w\), got shape \(1, 2, 3, 4\)"):
        codec("fp16").encode(torch.zeros(1, 2, 3, 4), level="p3")
    with pytest.raises(CodecError, match="keeps all 6 positions, found 5"):
        decode(Encoded(rows=5, payload=bytes(20)), "fp16", (2, 2, 3), level="p3")
    with pytest.raises(CodecError, match="expected 12 fp16 values of 2 bytes, found 20 bytes"):
        decode(Encoded(rows=6, payload=bytes(20)), "fp16", (2, 2, 3), level="p3")
    with pytest.raises(CodecError, match="codec int8_channel needs 4 bytes of scales, found 3"):
        decode(Encoded(rows=6, payload=bytes(12), scale=bytes(3)), "int8_channel", (2, 2, 3), level="p3")
    for mask in (None, torch.ones(3, 2, dtype=torch.bool)):
        with pytest.raises(CodecError, match=r"'p3': codec sparse_position needs a mask \(2, 3\), got"):
            codec("sparse_position").encode(torch.zeros(2, 2, 3), mask, level="p3")
    with pytest.raises(CodecError, match="codec sparse_channel needs 1 bytes of mask, found 2"):
        decode(
            Encoded(rows=1, payload=bytes(2), scale=bytes(4), mask=bytes(2)), "sparse_channel", (2, 2, 3), level="p3"
        )
    with pytest.raises(CodecError, match="the mask names 3 of 6 positions, 2 are stored"):
        decode(Encoded(rows=2, payload=bytes(4), scale=bytes(4), mask=b"\x07"), "sparse_channel", (2, 2, 3), level="p3")


def test_an_unknown_codec_is_told_what_there_is() -> None:
    with pytest.raises(ValueError, match="no codec 'fp61'; there are: fp16, fp32, int8_channel, int8_position"):
        codec("fp61")


def test_a_choice_is_between_codecs_of_one_kind_the_largest_last() -> None:
    for name, candidates in CHOICES.items():
        assert name not in CODECS
        sizes = [tap_bytes(codec(one), 64, 1000, 1000) for one in candidates]
        assert sizes == sorted(sizes)
        assert len({codec(one).sparse for one in candidates}) == 1
