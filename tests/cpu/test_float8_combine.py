"""Rows of combine that travel as float8: what is quantised, where it lies, what is made of it."""

from __future__ import annotations

import pytest
import torch

from ep_backend import LowLatencyBuffer, reference
from tests.cpu.test_float8 import FLOAT8
from tests.protocol.test_float8 import interesting_floats
from tests.support.memory import address_of, byte_of
from tests.support.scenario import same_bits
from tests.support.shapes import Shape
from tests.support.strategies import DTYPES, REDUCTIONS


def home(rows: torch.Tensor, weights: torch.Tensor, reduction: str = "rank") -> torch.Tensor:
    """What comes home of expert rows `[K, T, H]`, of which one rank has all, with weights
    `[T, K]`."""
    top_k, num_tokens, hidden = rows.shape
    shape = Shape(
        1,
        num_tokens,
        hidden,
        num_experts=top_k,
        top_k=top_k,
        dtype=rows.dtype,
        combine_dtype=FLOAT8,
        reduction=reduction,
    )
    (buffer,) = shape.virtual_buffers()
    x = torch.zeros((num_tokens, hidden), dtype=rows.dtype)
    idx = torch.arange(top_k).expand(num_tokens, -1).contiguous()
    is_source = reduction == "source"
    result = buffer.dispatch_and_receive(x, idx, None if is_source else weights)
    return buffer.combine_and_receive(
        rows, result.handle, topk_weights=weights if is_source else None
    )


def numbers(t: torch.Tensor) -> torch.Tensor:
    """With one NaN: its sign and payload are not defined by arithmetic."""
    return t.masked_fill(t.isnan(), float("nan"))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_bits_equal_the_reference(dtype: torch.dtype, reduction: str) -> None:
    """Random bits: NaN, infinities and denormals among them; zeros, huge and tiny rows."""
    generator = torch.Generator().manual_seed(5)
    as_int = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(as_int)
    bits = torch.randint(info.min, info.max, (64, 300), generator=generator, dtype=as_int)
    rows = bits.view(dtype)
    rows[0] = 0
    rows[1] = -0.0
    rows[2] = torch.finfo(dtype).max
    rows[3] = float("nan")
    rows[4, :128] = float("-inf")
    rows[5] = torch.randn(300, generator=generator) * 1e-6
    rows[6:32] = torch.randn((26, 300), generator=generator)
    out = home(rows[None], torch.ones(64, 1), reduction)
    expected = reference.travelled(rows.float(), FLOAT8).to(dtype)
    assert same_bits(numbers(out), numbers(expected))
    assert not out[6:32].isnan().any()


def test_every_float8_value_comes_home_as_it_is() -> None:
    """Rows whose groups have amax 448, so that their scale is 1."""
    values = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()
    values = values[~values.isnan()]
    rows = torch.cat([values.view(2, 127), torch.full((2, 1), 448.0)], 1)
    assert same_bits(home(rows[None], torch.ones(2, 1)), rows)


def test_every_rounding_equals_torchs() -> None:
    values = interesting_floats()
    values = values[values.abs() <= 448]
    padded = torch.nn.functional.pad(values, (0, -len(values) % 127)).view(-1, 127)
    rows = torch.cat([padded, torch.full((len(padded), 1), 448.0)], 1)
    assert same_bits(home(rows[None], torch.ones(len(rows), 1)), rows.to(FLOAT8).float())


def test_a_partial_sum_is_quantised_before_it_is_rounded() -> None:
    """1 + 2^-9 + 1/16 is just above the middle of two float8 values, 1 and 1.125; as bfloat16 it
    would be the middle, and go down to the even one."""
    rows = torch.zeros((2, 1, 128), dtype=torch.bfloat16)
    rows[0, 0, 0], rows[1, 0, 0] = 1 + 1 / 16, 2.0**-9
    rows[0, 0, 1] = 448
    out = home(rows, torch.ones(1, 2))
    assert (rows[0] + rows[1])[0, 0] == 1 + 1 / 16
    assert out[0, :3].tolist() == [1.125, 448, 0]


def test_rows_that_are_reduced_at_home_get_their_weights_there() -> None:
    """Quantised as the experts made them: a weight that is no power of two changes no scale."""
    rows = torch.zeros((2, 1, 256))
    rows[0, 0, :3] = torch.tensor([448, 1 + 1 / 16, 3.0])
    rows[1, 0, 128:131] = torch.tensor([448, 1.3125, -2])
    out = home(rows, torch.tensor([[3.0, 5.0]]), "source")
    assert out[0, :4].tolist() == [3 * 448, 3, 9, 0]
    assert out[0, 128:132].tolist() == [5 * 448, 5 * 1.25, -10, 0]


def test_an_infinity_spoils_its_128_channels_and_a_nan_only_itself() -> None:
    rows = torch.ones((1, 1, 300))
    rows[0, 0, 130] = float("inf")
    rows[0, 0, 270] = float("nan")
    is_nan = home(rows, torch.ones(1, 1)).isnan()[0].nonzero().flatten().tolist()
    assert is_nan == [*range(128, 256), 270]


def test_a_row_and_its_scales_lie_in_one_outcome() -> None:
    shape = Shape(2, hidden=150, num_experts=2, top_k=2, dtype=torch.float32, combine_dtype=FLOAT8)
    x, idx, weights = torch.randn(1, 150), torch.tensor([[0, 1]]), torch.tensor([[0.5, 3.0]])
    buffers = shape.virtual_buffers(timeout_secs=1.0)
    sent = [buffers[0].dispatch(x, idx, weights), buffers[1].dispatch(x[:0], idx[:0], weights[:0])]
    for _, hook in sent:
        hook()
    returned = [
        b.combine(result.recv_x, result.handle)
        for b, (result, _) in zip(buffers, sent, strict=True)
    ]
    layout = shape.layout()
    for rank in range(2):
        rows, scales = reference.quantize(weights[:, rank, None] * x)
        outcome = layout.outcome(1, rank)
        assert address_of(buffers[0], outcome + layout.combine_scales_in_row) % 16 == 0
        assert bytes_at(buffers[0], outcome, rows) == bytes_of(rows)
        assert bytes_at(buffers[0], outcome + 160, scales) == bytes_of(scales)
    for _, hook in returned:
        hook()
    expected = sum(reference.travelled(w * x, FLOAT8) for w in weights[0])
    assert same_bits(returned[0][0], expected)


def bytes_at(buffer: LowLatencyBuffer, offset: int, tensor: torch.Tensor) -> bytes:
    return bytes(byte_of(buffer, offset + i).value for i in range(tensor.nbytes))


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()
