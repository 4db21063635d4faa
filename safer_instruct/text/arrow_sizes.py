"""Read the unpacked size of compressed arrow batches from their metadata, before anything is unpacked.

pyarrow unpacks a batch as a whole, whatever its size. The format is in github.com/apache/arrow, format/Message.fbs: a
message is a flatbuffer of tables, whose fields are found by number.
"""

from __future__ import annotations

from contextlib import suppress
from struct import error as StructError
from struct import unpack_from

import pyarrow

MAGIC = b"ARROW1"  # a file begins with it and two zeros, followed by a stream
HEADER, DATA, BUFFERS, COMPRESSION = 2, 1, 2, 3  # fields of Message, DictionaryBatch, RecordBatch


def largest_unpacked(source: pyarrow.NativeFile) -> int:
    """Return the unpacked bytes of the largest compressed batch; 0 if there is none or this is no arrow file."""
    largest = 0
    with suppress(pyarrow.ArrowException, OSError, StopIteration, StructError, ValueError):
        source.seek(8 if source.read(len(MAGIC)) == MAGIC else 0)
        messages = pyarrow.ipc.MessageReader.open_stream(source)
        while True:
            message = messages.read_next_message()
            data = memoryview(message.metadata)
            batch = _follow(data, _field(data, _follow(data, 0), HEADER))
            if message.type == "dictionary":
                batch = _follow(data, _field(data, batch, DATA))
            if message.type != "schema" and _field(data, batch, COMPRESSION):
                largest = max(largest, _unpacked(data, batch, memoryview(message.body)))
    return largest


def _unpacked(data: memoryview, batch: int, body: memoryview) -> int:
    """Sum the first 8 bytes of each buffer: its unpacked size, or -1 if it is stored uncompressed."""
    buffers = _follow(data, _field(data, batch, BUFFERS))
    places = [unpack_from("<qq", data, buffers + 4 + 16 * i) for i in range(*unpack_from("<I", data, buffers))]
    return sum(max(length, *unpack_from("<q", body, start)) for start, length in places if length)


def _follow(data: memoryview, place: int) -> int:
    return place + int(unpack_from("<I", data, place)[0])


def _field(data: memoryview, table: int, number: int) -> int:
    """Return the offset of a field of a table; 0 if the field is absent."""
    (back,) = unpack_from("<i", data, table)
    size, _, *fields = unpack_from(f"<{unpack_from('<H', data, table - back)[0] // 2}H", data, table - back)
    return table + fields[number] if number < size // 2 - 2 and fields[number] else 0
