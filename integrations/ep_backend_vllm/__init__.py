"""ep_backend in vLLM: `--all2all-backend ep_backend_low_latency | ep_backend_high_throughput`.

vLLM loads `register` as a general plugin in every process: before the command line is parsed, in
engine cores and in workers. It changes vLLM only as far as needed for the backend's name to be
accepted and served; with another backend chosen, nothing behaves differently.
"""

from __future__ import annotations

_is_registered = False


def register() -> None:
    """Makes the backend known to vLLM. Idempotent.

    Raises:
        UnsupportedVLLM: this vLLM does not look as the patches expect; the text says where, and
            which versions are supported.
    """
    global _is_registered
    if _is_registered:
        return
    # Imported here: the package must be importable where vLLM is not installed.
    from ep_backend_vllm import (
        communicator,
        config,
        cpu,
        cpu_default,
        kernels,
        micro_batches,
        tracing,
    )

    parts = (config, communicator, kernels, micro_batches, cpu, cpu_default, tracing)
    for part in parts:  # all of them first: a half-applied plugin would be worse than none
        part.check()
    for part in parts:
        part.install()
    _is_registered = True
