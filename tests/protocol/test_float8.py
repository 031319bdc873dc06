"""csrc/protocol/float8.h against PyTorch: every float that could be rounded wrongly, and scales."""

from __future__ import annotations

import struct

import pytest
import torch

from ep_backend import _native, reference
from ep_backend.settings import SCALE_FORMATS


def float32_of(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).view(torch.float32)


def neighbours(values: torch.Tensor) -> torch.Tensor:
    """Float32 values, the next larger and the next smaller ones."""
    up, down = (torch.full_like(values, float(s)) for s in ("inf", "-inf"))
    return torch.cat([values, values.nextafter(up), values.nextafter(down)])


def interesting_floats() -> torch.Tensor:
    """Every bfloat16; every e4m3 value and every tie between two, with their neighbours; both
    signs, denormals, infinities and NaNs among them."""
    bfloat16 = float32_of(torch.arange(1 << 16) << 16)
    e4m3 = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (e4m3[1:] + e4m3[:-1]) / 2
    beyond = torch.tensor([448.0, 464.0, 480.0, 1e30])
    edges = neighbours(torch.cat([e4m3, ties, beyond]))
    return torch.cat([bfloat16, edges, -edges])


def test_rounding_equals_torchs_with_448_for_all_beyond() -> None:
    values = interesting_floats()
    clamped = values.clamp(-448, 448).to(torch.float8_e4m3fn)
    expected = clamped.view(torch.uint8).masked_fill(values.isnan(), 0x7F).tolist()
    wrong = [
        (value, got, want)
        for value, want in zip(values.tolist(), expected, strict=True)
        if (got := _native.to_e4m3(value)) != want
    ]
    assert len(values) > 66_000
    assert not wrong


def test_all_values_equal_torchs() -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = torch.tensor([_native.from_e4m3(value) for value in range(256)])
    assert values[[0x7F, 0xFF]].isnan().all()
    is_number = ~expected.isnan()
    assert is_number.sum() == 254
    assert torch.equal(values[is_number].view(torch.int32), expected[is_number].view(torch.int32))


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
def test_scales_equal_the_references(scale_format: str) -> None:
    amax = neighbours(float32_of(torch.arange(0x7F81) << 16)).abs()
    amax = torch.cat([amax[~amax.isnan()], 448 * 2.0 ** torch.arange(-23, 100)])
    _, scales = reference.quantize(amax[:, None], scale_format)
    native = [_native.scale_for(value, SCALE_FORMATS[scale_format]) for value in amax.tolist()]
    assert torch.equal(torch.tensor([scale for scale, _ in native]), scales[:, 0])
    if scale_format == "float32":
        inverse = torch.full_like(amax, 448.0) / amax.clamp(min=1e-4)
        assert torch.equal(torch.tensor([inverse for _, inverse in native]), inverse)


@pytest.mark.parametrize("scale_format", ["power_of_two", "ue8m0"])
def test_powers_of_two_are_the_smallest_that_hold_amax(scale_format: str) -> None:
    for amax in (1e-4, 0.5, 1.0, 448.0, 448.0001, 896.0, 1e9, 3e38):
        scale, inverse = _native.scale_for(amax, SCALE_FORMATS[scale_format])
        assert struct.unpack("<I", struct.pack("<f", scale))[0] & 0x7FFFFF == 0
        assert scale * inverse == 1.0
        assert amax / scale <= 448.0001 < 2 * max(amax, 1e-4) / scale * 1.0001


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
def test_tiny_and_infinite_groups_have_a_finite_inverse(scale_format: str) -> None:
    native_format = SCALE_FORMATS[scale_format]
    assert _native.scale_for(0.0, native_format) == _native.scale_for(1e-4, native_format)
    _, inverse = _native.scale_for(float("inf"), native_format)
    assert inverse == (0.0 if scale_format == "float32" else 2.0**-126)
