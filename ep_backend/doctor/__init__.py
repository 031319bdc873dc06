"""`ep-backend doctor`: what runs on this machine, over which links, and what is missing."""

from __future__ import annotations

from ep_backend.doctor.checks import Check, Level, Machine
from ep_backend.doctor.links import Link, link_table
from ep_backend.doctor.report import CONFIGS, Examination, examine

__all__ = ["CONFIGS", "Check", "Examination", "Level", "Link", "Machine", "examine", "link_table"]
