"""TensorBoard's event files of scalars, written without a package that takes 0.2 s to import.

Records are TFRecords of Event messages in protobuf's encoding
(https://github.com/tensorflow/tensorboard/blob/master/tensorboard/compat/proto/event.proto).
"""

import os
import socket
import struct
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path


class EventFile:
    """Appends scalars to a new event file.

    Args:
        folder: of the run.
        first_step: earlier files' scalars from this step on do not count.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._write(time.time(), 0, _field(3, b"brain.Event:2"))
        self._write(time.time(), first_step, _field(7, b"\x08\x01"))  # a session starts

    def write(self, seconds: float, step: int, scalars: Mapping[str, float]) -> None:
        """Append scalars by tag, with the time (seconds since 1970)."""
        values = (
            _field(1, _field(1, tag.encode()) + b"\x15" + struct.pack("<f", value))
            for tag, value in scalars.items()
        )
        self._write(seconds, step, _field(5, b"".join(values)))

    def _write(self, seconds: float, step: int, content: bytes) -> None:
        event = b"\x09" + struct.pack("<d", seconds) + b"\x10" + _varint(step) + content
        size = struct.pack("<Q", len(event))
        self._file.write(size + _checksum(size) + event + _checksum(event))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    groups = []
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])


@cache
def _crc_table() -> list[int]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)  # Castagnoli's polynomial, reversed
        table.append(crc)
    return table


def _checksum(content: bytes) -> bytes:
    """Return the masked CRC-32C of a TFRecord."""
    crc, table = 0xFFFFFFFF, _crc_table()
    for byte in content:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
