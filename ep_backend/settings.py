"""Checks of a buffer's settings, before the ranks agree on them."""

from __future__ import annotations

import torch

from ep_backend import _native
from ep_backend.checks import check_int

DTYPES = {
    torch.float32: _native.DType.FLOAT32,
    torch.bfloat16: _native.DType.BFLOAT16,
}


def device_type(device: str | torch.device) -> str:
    """Of a device that torch does not know, its name: `check_settings` refuses it, in company."""
    try:
        return torch.device(device).type
    except RuntimeError:
        return str(device)


def check_settings(num_ranks: int, settings: dict) -> None:
    check_int("num_ranks", num_ranks, 1, _native.MAX_RANKS)
    check_int("num_experts", settings["num_experts"], 1, _native.MAX_EXPERTS)
    check_int(
        "num_max_tokens_per_rank",
        settings["num_max_tokens_per_rank"],
        1,
        _native.MAX_TOKENS_PER_RANK,
        "A signal counts messages in 16 bits.",
    )
    check_int("hidden", settings["hidden"], 1, 1 << 20)
    check_int("top_k", settings["top_k"], 1, _native.MAX_TOP_K)
    check_int("num_banks", settings["num_banks"], 2, _native.MAX_BANKS)
    if settings["dtype"] not in DTYPES:
        allowed = " or ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"dtype is {settings['dtype']}, expected {allowed}.")
    if settings["device"] == "cuda" and _native.has_cuda:
        why = "The CUDA kernels count rows by expert in shared memory."
        check_int("num_experts", settings["num_experts"], 1, _native.CUDA_MAX_EXPERTS, why)


def usable_device(device: str | torch.device) -> torch.device:
    """The device, with its index. Raises `ValueError` where no kernels can run on it."""
    kind = device_type(device)
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda":
        raise ValueError(f"device is {str(device)!r}, expected 'cpu' or a CUDA device.")
    if not _native.has_cuda:
        raise ValueError(
            f"device is {str(device)!r}, but this build is CPU-only. Build it where nvcc is, with "
            "EP_BACKEND_CUDA=ON."
        )
    if not torch.cuda.is_available():
        raise ValueError(f"device is {str(device)!r}, but torch sees no CUDA device.")
    index = torch.device(device).index
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


def check_num_sms(num_sms: int | None, device: torch.device) -> None:
    if num_sms is not None and device.type == "cuda":
        num_present = torch.cuda.get_device_properties(device).multi_processor_count
        check_int("num_sms", num_sms, 1, num_present, f"{device} has so many.")


def check_waits(timeout_secs: float, spin_us: float | None) -> None:
    if timeout_secs <= 0:
        raise ValueError(f"timeout_secs is {timeout_secs}, expected more than 0.")
    if spin_us is not None and spin_us < 0:
        raise ValueError(f"spin_us is {spin_us}, expected 0 or more.")
