"""The names users pass to `--all2all-backend`."""

from __future__ import annotations

LOW_LATENCY = "ep_backend_low_latency"

# The prefill adapter, ep_backend_high_throughput, comes with the normal kernels.
BACKENDS = (LOW_LATENCY,)
