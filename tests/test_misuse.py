"""What programs around a buffer do to it: global defaults, signals, forks, threads, moved tensors.
It goes on right, or says what is wrong; it never sends one batch for another."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ep_backend import (
    EPBackendError,
    LowLatencyBuffer,
    NormalBuffer,
    OrderError,
    PeerTimeout,
    ProtocolError,
    RendezvousError,
    SettingsMismatch,
    outputs,
    virtual_world,
)
from tests.support.shapes import Shape

Kind = type[LowLatencyBuffer] | type[NormalBuffer]
both_kinds = pytest.mark.parametrize("kind", [LowLatencyBuffer, NormalBuffer])


def make(kind: Kind, **settings: Any) -> Any:
    """The buffer of a rank that is alone."""
    settings |= {"hidden": 256, "num_experts": 4, "top_k": 2, "dtype": torch.float32}
    if kind is LowLatencyBuffer:
        settings["num_max_tokens_per_rank"] = 64
    return kind(virtual_world(1).groups[0], **settings)


def make_two(timeout_secs: float, reduction: str = "rank") -> list[LowLatencyBuffer]:
    shape = Shape(
        2,
        num_max_tokens_per_rank=64,
        hidden=256,
        num_experts=4,
        top_k=2,
        dtype=torch.float32,
        reduction=reduction,
    )
    return shape.virtual_buffers(timeout_secs=timeout_secs)


def batch(value: float, num_tokens: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Experts 0 and 2."""
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    x = torch.full((num_tokens, 256), value, **options)
    topk_idx = torch.tensor([[0, 2]] * num_tokens, device="cpu")
    topk_weights = torch.full((num_tokens, 2), 0.25, **options)
    topk_weights[:, 1] = 0.5
    return x, topk_idx, topk_weights


def round_trip(buffer: Any, value: float) -> None:
    x, topk_idx, topk_weights = batch(value)
    if isinstance(buffer, LowLatencyBuffer):
        result = buffer.dispatch_and_receive(x, topk_idx, topk_weights)
        assert (result.recv_x[0, :3].to(torch.float32) == value).all()
        out = buffer.combine_and_receive(result.recv_x.to(torch.float32), result.handle)
        assert (out == 0.75 * value).all()
    else:
        result = buffer.dispatch(x, topk_idx, topk_weights)
        assert result.recv_topk_weights.tolist() == topk_weights.tolist()
        out, weights = buffer.combine(
            result.recv_x.to(torch.float32),
            result.handle,
            topk_weights=result.recv_topk_weights,
        )
        assert (out == value).all()
        assert weights.tolist() == topk_weights.tolist()


@both_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(kind: Kind, dtype: torch.dtype) -> None:
    """Engines set it while they load a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        round_trip(make(kind), 2.0)
        round_trip(make(kind, dispatch_dtype=torch.float8_e4m3fn), 448.0)
    finally:
        torch.set_default_dtype(before)


@both_kinds
def test_the_default_device_changes_nothing(kind: Kind) -> None:
    with torch.device("meta"):
        round_trip(make(kind), 2.0)


@both_kinds
def test_a_first_call_in_inference_mode_leaves_no_inference_tensors(kind: Kind) -> None:
    buffer = make(kind)
    with torch.inference_mode():
        round_trip(buffer, 1.0)
    round_trip(buffer, 2.0)


@both_kinds
def test_a_negative_that_memory_does_not_hold_is_refused(kind: Kind) -> None:
    """Kernels read memory: they would send the opposite."""
    x, topk_idx, topk_weights = batch(1.0)
    negative = torch._neg_view(x)
    with pytest.raises(ValueError, match=r"x of shape \[3, 256\] .* Pass x\.resolve_neg\(\)"):
        make(kind).dispatch(negative, topk_idx, topk_weights)


@both_kinds
def test_a_gradient_that_ends_is_told(kind: Kind) -> None:
    buffer = make(kind)
    x, topk_idx, topk_weights = batch(1.0)
    needs_gradient = x.clone().requires_grad_()
    with pytest.warns(UserWarning, match=r"dispatch was given .* ep_backend\.normal_autograd"):
        dispatched = buffer.dispatch(needs_gradient, topk_idx, topk_weights)
    result, hook = dispatched if kind is LowLatencyBuffer else (dispatched, lambda: None)
    hook()
    rows = result.recv_x.clone().requires_grad_()
    with pytest.warns(UserWarning, match="combine was given"):
        buffer.combine(rows, result.handle)


@both_kinds
@pytest.mark.filterwarnings("error")
def test_where_no_gradients_are_recorded_none_is_missed(kind: Kind) -> None:
    x, topk_idx, topk_weights = batch(1.0)
    with torch.no_grad():
        make(kind).dispatch(x.requires_grad_(), topk_idx, topk_weights)


OVERWRITTEN = "modified by an inplace operation"


def test_received_rows_that_a_gradient_needs_are_not_overwritten_unnoticed() -> None:
    buffer = make(LowLatencyBuffer)
    weight = torch.ones((), requires_grad=True)

    def product() -> torch.Tensor:
        result, hook = buffer.dispatch(*batch(1.0))
        hook()
        return (result.recv_x * weight).sum()  # keeps the rows

    first, second = product(), product()
    first.backward()  # of the other bank
    product()
    second.backward()
    overwritten = product()
    for _ in range(buffer.num_banks):
        product()
    with pytest.raises(RuntimeError, match=OVERWRITTEN):
        overwritten.backward()


@both_kinds
def test_a_result_that_a_gradient_needs_is_not_overwritten_unnoticed(kind: Kind) -> None:
    buffer = make(kind)
    weight, out = torch.ones((), requires_grad=True), torch.ones(3, 256)
    dispatched = buffer.dispatch(*batch(1.0))
    result, hook = dispatched if kind is LowLatencyBuffer else (dispatched, lambda: None)
    hook()
    kept = (out * weight).sum()
    buffer.combine(result.recv_x, result.handle, out=out)
    with pytest.raises(RuntimeError, match=OVERWRITTEN):
        kept.backward()
    with torch.inference_mode():  # whose tensors have no such count
        buffer.combine(result.recv_x, result.handle, out=torch.empty(3, 256))


# --- signals ---------------------------------------------------------------------------------


@contextmanager
def interrupted_behind(buffer: Any, kind: str) -> Iterator[None]:
    """The kernel ends, and a handler raises before anybody has taken note."""
    kernels = buffer._calls._kernels
    kernel = getattr(kernels, kind)

    def run(*args: Any) -> None:
        kernel(*args)
        raise KeyboardInterrupt

    setattr(kernels, kind, run)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        setattr(kernels, kind, kernel)


@pytest.mark.parametrize("half", ["dispatch_send", "dispatch_recv", "combine_send", "combine_recv"])
def test_a_call_that_was_interrupted_when_done_fails_the_buffer(half: str) -> None:
    buffer = make(LowLatencyBuffer)
    round_trip(buffer, 1.0)
    with interrupted_behind(buffer, half):
        round_trip(buffer, 2.0)
    with pytest.raises(EPBackendError, match=rf"{half} was interrupted by KeyboardInterrupt\(\)"):
        round_trip(buffer, 3.0)


def test_a_normal_call_that_was_interrupted_when_done_fails_the_buffer() -> None:
    buffer = make(NormalBuffer)
    with interrupted_behind(buffer, "normal_dispatch"):
        round_trip(buffer, 2.0)
    with pytest.raises(EPBackendError, match="normal_dispatch was interrupted"):
        round_trip(buffer, 3.0)


def test_a_call_that_was_interrupted_before_goes_on() -> None:
    buffer = make(LowLatencyBuffer)
    kernels = buffer._calls._kernels
    kernel = kernels.dispatch_send

    def run(*_: Any) -> None:
        raise KeyboardInterrupt

    kernels.dispatch_send = run
    with pytest.raises(KeyboardInterrupt):
        round_trip(buffer, 1.0)
    kernels.dispatch_send = kernel
    round_trip(buffer, 2.0)


# --- processes and threads -------------------------------------------------------------------


@both_kinds
def test_a_forked_process_cannot_use_the_buffer(kind: Kind) -> None:
    buffer = make(kind)
    round_trip(buffer, 1.0)
    child = os.fork()
    if child == 0:
        try:
            round_trip(buffer, 77.0)
        except EPBackendError as e:
            os._exit(0 if "was forked from" in str(e) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    round_trip(buffer, 2.0)


def test_close_beside_a_hook_that_waits_is_refused() -> None:
    buffer, peer = make_two(timeout_secs=20.0)
    _, hook = buffer.dispatch(*batch(1.0))
    waiting = threading.Thread(target=hook)
    waiting.start()
    while not buffer._dispatches._hook_lock.locked():
        time.sleep(0.001)
    with pytest.raises(OrderError, match="dispatch hook is running in another thread"):
        buffer.close()
    peer.dispatch(*batch(2.0))
    waiting.join()
    buffer.close()


def test_a_thread_that_waits_does_not_abort_a_process_that_ends() -> None:
    program = """
        import threading, time
        from tests.test_misuse import batch, make_two
        _, hook = make_two(timeout_secs=60.0)[0].dispatch(*batch(1.0))
        threading.Thread(target=hook, daemon=True).start()
        time.sleep(0.3)
        print("ends")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "ends\n"), done.stderr


@pytest.mark.parametrize("reduction", ["rank", "source"])
def test_combines_in_another_order_than_the_peers_are_refused(reduction: str) -> None:
    """Where sizes differ: the peer answers another number of tokens than were sent to it."""
    buffers = make_two(timeout_secs=20.0, reduction=reduction)
    results = []
    for num_tokens in (3, 5):
        x, topk_idx, topk_weights = batch(1.0, num_tokens)
        at_home = topk_weights if reduction == "source" else None
        of_experts = topk_weights if reduction == "rank" else None
        sent = [buffer.dispatch(x, topk_idx, of_experts) for buffer in buffers]
        for _, hook in sent:
            hook()
        results.append([(result, at_home) for result, _ in sent])
    hooks = []
    for rank, order in ((0, (0, 1)), (1, (1, 0))):
        for result, at_home in (results[op][rank] for op in order):
            _, hook = buffers[rank].combine(result.recv_x.clone(), result.handle, None, at_home)
            hooks.append(hook)
    with pytest.raises(ProtocolError, match=r"rank 1 contradicts .*expected 3, saw 5.*different"):
        hooks[0]()


# --- memory ----------------------------------------------------------------------------------


def test_received_rows_may_be_moved_to_shared_memory() -> None:
    """As a queue to another process does."""
    buffer = make(LowLatencyBuffer)
    for value in range(1, 8):
        result = buffer.dispatch_and_receive(*batch(float(value)))
        assert (result.recv_x[0, :3] == value).all()
        result.recv_x.share_memory_()


@pytest.mark.parametrize(("layout", "weight"), [("expert_major", 0.75), ("rank_major", 1.0)])
def test_received_tensors_may_be_given_up(layout: str, weight: float) -> None:
    """As SGLang does between the experts' GEMMs, to free memory that is not its own here."""
    buffer = make(LowLatencyBuffer, output_layout=layout)
    for value in range(1, 8):
        with torch.inference_mode(value % 2 == 0):
            result = buffer.dispatch_and_receive(*batch(float(value)))
            rows = result.recv_x.clone()
            for tensor in (result.recv_x, result.recv_topk_idx, result.recv_topk_weights):
                if tensor is not None:
                    tensor.set_(torch.empty((0,), dtype=tensor.dtype))
            combined = buffer.combine_and_receive(rows, result.handle)
            assert (combined == weight * value).all()


def test_a_dispatch_without_memory_for_its_rows_sends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    buffer = make(LowLatencyBuffer)

    def no_memory(*_: Any) -> None:
        raise RuntimeError("can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "RecvBank", no_memory)
        for _ in range(4):  # more often than there are banks
            with pytest.raises(RuntimeError, match="can't allocate memory"):
                buffer.dispatch(*batch(1.0))
    round_trip(buffer, 2.0)


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        EPBackendError("a"),
        OrderError("b"),
        PeerTimeout("c", {"peer_rank": 1}),
        ProtocolError("d"),
        RendezvousError("e"),
        SettingsMismatch("f"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_come_home_from_other_processes(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


@both_kinds
def test_a_result_in_place_of_its_handle_is_named(kind: Kind) -> None:
    buffer = make(kind)
    x, topk_idx, topk_weights = batch(1.0)
    if kind is LowLatencyBuffer:
        result = buffer.dispatch_and_receive(x, topk_idx, topk_weights)
    else:
        result = buffer.dispatch(x, topk_idx, topk_weights)
    with pytest.raises(TypeError, match=r"handle is a \w*DispatchResult, .*Pass a result's handle"):
        buffer.combine(result.recv_x, result)


def test_a_failed_buffer_does_not_gather_tracebacks() -> None:
    buffer = make_two(timeout_secs=0.01)[0]
    _, hook = buffer.dispatch(*batch(1.0))
    depths = []
    for _ in range(3):
        with pytest.raises(PeerTimeout) as raised:
            hook()
        depths.append(len(raised.traceback))
    assert depths[1] == depths[2]
