"""Reads what W&B keeps of an offline run: blocks of 32 KiB with pieces of protobuf records."""

import struct
from pathlib import Path

from wandb.proto import wandb_internal_pb2

BLOCK = 32768
HEADER = 7  # of the file, and of every piece: checksum (4), length (2), kind (1)
WHOLE, FIRST, LAST = 1, 2, 4


def records(path):
    """Every whole record of a ``.wandb`` file; what a killed process left half-written is not."""
    data = Path(path).read_bytes()
    position, parts = HEADER, b""
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        piece = data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind == 0 or len(piece) < length:
            return
        parts = piece if kind in (WHOLE, FIRST) else parts + piece
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def runs(folder):
    """Records of every offline run below a folder, by file, in the order of their names."""
    return {path: list(records(path)) for path in sorted(Path(folder).rglob("*.wandb"))}


def history(record, key):
    """A number of one step of the history, None if this record is none."""
    for item in record.history.item:
        if key in (item.key, ".".join(item.nested_key)):
            return float(item.value_json)
    return None
