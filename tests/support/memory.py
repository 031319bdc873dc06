"""Direct access to a rank's symmetric memory, to look at it and to damage it."""

from __future__ import annotations

import ctypes

from ep_backend import LowLatencyBuffer


class MessageHeader(ctypes.Structure):
    """Mirrors csrc/protocol/message.h."""

    _fields_ = [
        ("src_token", ctypes.c_uint32),
        ("outcome_slot", ctypes.c_uint32),
        ("num_entries", ctypes.c_uint32),
        ("epoch_tag", ctypes.c_uint32),
    ]


class ExpertEntry(ctypes.Structure):
    """Mirrors csrc/protocol/message.h."""

    _fields_ = [
        ("local_expert", ctypes.c_uint16),
        ("k", ctypes.c_uint16),
        ("position", ctypes.c_uint32),
        ("weight", ctypes.c_float),
    ]


def address_of(buffer: LowLatencyBuffer, offset: int) -> int:
    """Where the buffer's own rank keeps this byte of its memory."""
    assert 0 <= offset < buffer.num_symmetric_bytes
    return buffer._memory.bases[buffer.group.self_rank] + offset


def word_of(buffer: LowLatencyBuffer, offset: int) -> ctypes.c_uint64:
    return ctypes.c_uint64.from_address(address_of(buffer, offset))


def byte_of(buffer: LowLatencyBuffer, offset: int) -> ctypes.c_uint8:
    return ctypes.c_uint8.from_address(address_of(buffer, offset))


def header_of(buffer: LowLatencyBuffer, message_offset: int) -> MessageHeader:
    return MessageHeader.from_address(address_of(buffer, message_offset))


def entry_of(buffer: LowLatencyBuffer, message_offset: int, i: int) -> ExpertEntry:
    offset = message_offset + ctypes.sizeof(MessageHeader) + i * ctypes.sizeof(ExpertEntry)
    return ExpertEntry.from_address(address_of(buffer, offset))
