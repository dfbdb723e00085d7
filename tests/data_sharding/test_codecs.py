import numpy as np
import pytest
import torch

from data_sharding.codecs import CODECS, CodecError, Encoded, codec, decode


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shape", [(3, 1, 1), (5, 4, 7), (1, 2, 3)])
def test_a_tap_comes_back_within_the_codecs_precision_with_channels_last(
    name: str, shape: tuple[int, int, int]
) -> None:
    x = torch.linspace(-3, 3, int(np.prod(shape))).view(shape)
    encoded = codec(name).encode(x, level="p3")
    back = decode(encoded, name, shape, level="p3")
    assert encoded.rows == shape[1] * shape[2]
    assert len(encoded.payload) == encoded.rows * codec(name).row_bytes(shape[0])
    assert back.shape == x.shape
    assert back.permute(1, 2, 0).is_contiguous()
    torch.testing.assert_close(back.float(), x, rtol=2**-11, atol=0)


def test_fp32_is_exact_for_every_kind_of_number() -> None:
    x = torch.tensor([0.0, -0.0, 1e-45, -3.4e38, 1 / 3, 65504.0]).view(2, 1, 3)
    back = decode(codec("fp32").encode(x, level="p3"), "fp32", (2, 1, 3), level="p3")
    assert back.contiguous().numpy().tobytes() == x.numpy().tobytes()


def test_a_tap_in_any_memory_layout_and_float_type_gives_the_same_rows() -> None:
    x = torch.rand(4, 3, 5).half()
    expected = bytes(codec("fp16").encode(x, level="p3").payload)
    last = x[None].contiguous(memory_format=torch.channels_last)[0]
    assert bytes(codec("fp16").encode(last, level="p3").payload) == expected
    assert bytes(codec("fp16").encode(x.double(), level="p3").payload) == expected
    assert np.frombuffer(expected, np.float16)[:4].tolist() == x[:, 0, 0].tolist()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("fp16", 70000.0, "do not fit codec fp16 .largest 70000, limit 65504"),
        ("fp16", float("inf"), "already NaN or infinite"),
        ("fp32", float("nan"), "already NaN or infinite"),
    ],
)
def test_what_cannot_be_stored_is_an_error_that_names_the_level(name: str, value: float, told: str) -> None:
    x = torch.zeros(2, 2, 2)
    x[1, 0, 1] = value
    with pytest.raises(CodecError, match=f"'p5': 1 of 8 values {'' if 'fit' in told else 'are '}{told}"):
        codec(name).encode(x, level="p5")


def test_wrong_shapes_and_lengths_are_errors() -> None:
    with pytest.raises(CodecError, match=r"expected \(C, h, w\), got shape \(1, 2, 3, 4\)"):
        codec("fp16").encode(torch.zeros(1, 2, 3, 4), level="p3")
    with pytest.raises(CodecError, match="keeps all 6 positions, found 5"):
        decode(Encoded(rows=5, payload=bytes(20)), "fp16", (2, 2, 3), level="p3")
    with pytest.raises(CodecError, match="expected 12 fp16 values, found 10"):
        decode(Encoded(rows=6, payload=bytes(20)), "fp16", (2, 2, 3), level="p3")


def test_an_unknown_codec_is_told_what_there_is() -> None:
    with pytest.raises(ValueError, match="no codec 'fp61'; there are: fp16, fp32"):
        codec("fp61")
