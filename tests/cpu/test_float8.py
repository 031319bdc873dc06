"""Rows that travel as float8: what arrives, with which scales, and in which layout."""

from __future__ import annotations

import pytest
import torch

from ep_backend import reference
from tests.protocol.test_float8 import interesting_floats
from tests.support.memory import address_of, byte_of
from tests.support.scenario import (
    Scenario,
    check_combined,
    check_received,
    run_experts,
    same_bits,
)
from tests.support.shapes import Shape
from tests.support.strategies import DTYPES, OUTPUT_LAYOUTS, SCALE_FORMATS

FLOAT8 = torch.float8_e4m3fn


def float8_shape(num_ranks: int, **settings: object) -> Shape:
    return Shape(num_ranks, dispatch_dtype=FLOAT8, **settings)  # type: ignore[arg-type]


def receive_alone(
    shape: Shape, x: torch.Tensor, x_scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One rank sends itself all its tokens, for its only expert: rows and scales, by token."""
    (buffer,) = shape.virtual_buffers()
    idx = torch.zeros((len(x), 1), dtype=torch.int64)
    result = buffer.dispatch_and_receive(x, idx, torch.ones(len(x), 1), x_scales)
    assert result.recv_scales is not None
    return result.recv_x[0, : len(x)], result.recv_scales[0, : len(x)]


def alone(x: torch.Tensor, **settings: object) -> Shape:
    return float8_shape(
        1,
        num_max_tokens_per_rank=len(x),
        hidden=x.shape[1],
        num_experts=1,
        top_k=1,
        dtype=x.dtype,
        **settings,
    )


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_bits_equal_the_reference(scale_format: str, dtype: torch.dtype) -> None:
    """Random bits: NaN, infinities and denormals among them; zeros, huge and tiny rows."""
    generator = torch.Generator().manual_seed(7)
    as_int = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(as_int)
    bits = torch.randint(info.min, info.max, (64, 300), generator=generator, dtype=as_int)
    x = bits.view(dtype)
    x[0] = 0
    x[1] = -0.0
    x[2] = torch.finfo(dtype).max
    x[3] = float("nan")
    x[4, :128] = float("-inf")
    x[5] = torch.randn(300, generator=generator) * 1e-6
    x[6:32] = torch.randn((26, 300), generator=generator)
    rows, scales = receive_alone(alone(x, scale_format=scale_format), x)
    expected_rows, expected_scales = reference.quantize(x, scale_format)
    if scale_format == "ue8m0":
        scales = reference.unpack_ue8m0(scales, 3)
    assert same_bits(rows, expected_rows)
    assert same_bits(scales.contiguous(), expected_scales)


def test_every_rounding_of_the_kernels_vectors_equals_torchs() -> None:
    """Rows whose groups have amax 448, so that their inverse scale is 1."""
    values = interesting_floats()
    values = values[values.abs() <= 448]
    padded = torch.nn.functional.pad(values, (0, -len(values) % 127)).view(-1, 127)
    x = torch.cat([padded, torch.full((len(padded), 1), 448.0)], 1)
    rows, scales = receive_alone(alone(x), x)
    assert torch.equal(scales, torch.ones_like(scales))
    assert same_bits(rows, x.to(FLOAT8))


@pytest.mark.parametrize("output_layout", OUTPUT_LAYOUTS)
@pytest.mark.parametrize("hidden", [1, 128, 129, 512, 600])
def test_scales_lie_where_grouped_gemms_want_them(output_layout: str, hidden: int) -> None:
    num_scales = -(-hidden // 128)
    for scale_format, num_words in (("float32", num_scales), ("ue8m0", -(-num_scales // 4))):
        shape = float8_shape(
            2, hidden=hidden, scale_format=scale_format, output_layout=output_layout
        )
        buffers = shape.virtual_buffers()
        results = [
            b.dispatch(*Scenario(shape).add("uniform", [2, 2], 1).variants[0].inputs(r))[0]
            for r, b in enumerate(buffers)
        ]
        scales = results[0].recv_scales
        assert scales is not None
        assert scales.dtype == (torch.float32 if scale_format == "float32" else torch.int32)
        if output_layout == "expert_major":
            assert scales.shape == (4, 12, num_words)
            assert scales.transpose(1, 2).is_contiguous()
        else:
            assert scales.shape == (2, 6, num_words)
            assert scales.is_contiguous()


def test_exponent_bytes_of_scales_are_packed_lowest_first() -> None:
    x = torch.cat([torch.full((1, 128), 448.0 * 2.0**i) for i in range(-2, 4)], 1)
    _, words = receive_alone(alone(x, scale_format="ue8m0"), x)
    exponents = [125, 126, 127, 128, 129, 130, 0, 0]  # 0 behind the last group
    assert words.contiguous().view(torch.uint8)[0].tolist() == exponents
    assert reference.unpack_ue8m0(words, 6).tolist() == [[0.25, 0.5, 1.0, 2.0, 4.0, 8.0]]


@pytest.mark.parametrize("output_layout", OUTPUT_LAYOUTS)
def test_rows_that_the_caller_quantised_arrive_as_they_are(output_layout: str) -> None:
    """Any bytes, any scales: nothing looks into them."""
    shape = float8_shape(2, hidden=200, output_layout=output_layout)
    generator = torch.Generator().manual_seed(1)
    x = [
        torch.randint(256, (4, 200), generator=generator, dtype=torch.uint8).view(FLOAT8)
        for _ in range(2)
    ]
    x_scales = [torch.randn((4, 2), generator=generator) for _ in range(2)]
    idx, weights = torch.tensor([[0, 7, -1]] * 4), torch.ones(4, 3)
    buffers = shape.virtual_buffers()
    sent = [b.dispatch(x[r], idx, weights, x_scales[r]) for r, b in enumerate(buffers)]
    for result, hook in sent:
        hook()
        scales = result.recv_scales
        assert scales is not None
        if output_layout == "rank_major":
            got, got_scales = result.recv_x[:, :4].flatten(0, 1), scales[:, :4].flatten(0, 1)
        else:  # rank 0 owns expert 0, rank 1 expert 7
            local = int(result.num_recv_tokens_per_expert.argmax())
            got, got_scales = result.recv_x[local, :8], scales[local, :8]
        assert same_bits(got, torch.cat(x))
        assert same_bits(got_scales.contiguous(), torch.cat(x_scales))


def test_a_quantised_row_and_its_scales_lie_beside_each_other_in_memory() -> None:
    shape = float8_shape(1, hidden=130, num_experts=1, top_k=1, dtype=torch.float32)
    x = torch.randn(1, 130)
    (buffer,) = shape.virtual_buffers()
    buffer.dispatch(x, torch.zeros((1, 1), dtype=torch.int64), torch.ones(1, 1))
    rows, scales = reference.quantize(x)
    layout = shape.layout()
    assert address_of(buffer, layout.inbox_scales(1, 0, 0)) % 16 == 0

    def bytes_at(offset: int, tensor: torch.Tensor) -> bytes:
        return bytes(byte_of(buffer, offset + i).value for i in range(tensor.nbytes))

    for offset, expected in (
        (layout.inbox_row(1, 0, 0), rows),
        (layout.inbox_scales(1, 0, 0), scales),
    ):
        assert bytes_at(offset, expected) == expected.view(torch.uint8).numpy().tobytes()


def test_combine_goes_home_in_the_buffers_dtype() -> None:
    shape = float8_shape(2, hidden=140)
    variant = Scenario(shape).add("uniform", [5, 6], seed=4, is_quantized=True).variants[0]
    buffers = shape.virtual_buffers()
    sent = [b.dispatch(*variant.inputs(r)) for r, b in enumerate(buffers)]
    back = []
    for rank, (result, hook) in enumerate(sent):
        hook()
        check_received(result, variant, shape, rank)
        back.append(buffers[rank].combine(run_experts(result, shape, rank), result.handle))
    for rank, (out, hook) in enumerate(back):
        hook()
        assert out.dtype == torch.bfloat16
        check_combined(out, variant, rank)
