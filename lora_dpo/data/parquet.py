"""Parquet row group by row group, in pieces of a few rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lora_dpo.errors import UserError

ROWS_PER_BATCH = 64


def open_parquet(path: Path) -> pq.ParquetFile:
    """UserError if it isn't one."""
    try:
        # Without pre-buffering, and with a small buffer, a row group of pictures is never held as a whole.
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"not a readable parquet file ({error})", path) from error


def schema(path: Path) -> pa.Schema:
    with open_parquet(path) as file:
        return file.schema_arrow


def number_of_rows(path: Path) -> int:
    with open_parquet(path) as file:
        return file.metadata.num_rows


def batches(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(number of the first row, from 0; the next rows). UserError where the file is damaged."""
    start = 0
    with open_parquet(path) as file:
        read = file.iter_batches(ROWS_PER_BATCH, columns=list(columns))
        while True:
            try:
                batch = next(read, None)
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"the parquet file is damaged after row {start}: {error}", path) from error
            if batch is None:
                return
            yield start, batch
            start += batch.num_rows


def values(column: pa.Array) -> list[Any]:
    """As Python's, a text that isn't UTF-8 as bytes."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        # As bytes first: one invalid character must cost one row, not the batch.
        wide = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
        return [_text(value) for value in column.view(wide).to_pylist()]
    return column.to_pylist()


def _text(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return value
