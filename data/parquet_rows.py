"""Rows of a .parquet file, a few at a time, whatever the size of its row groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.errors import InputError

BATCH_ROWS = 64
_BUFFER_BYTES = 1 << 20  # read of each column at a time


def parquet_rows(path: Path, fields: Sequence[str]) -> Iterator[dict[str, Any] | None]:
    """Every row as {field: value} with those of `fields` that the file has as columns; None for one that is not UTF-8.

    Raises InputError when the file cannot be read, is damaged or is cut short.
    """
    import pyarrow as pa  # only here: importing it takes longer than reading a small corpus
    import pyarrow.parquet as pq

    try:
        # Without these two a whole row group would be read ahead, and a file may have only one.
        with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            present = set(file.schema_arrow.names)
            columns = [field for field in dict.fromkeys(fields) if field in present]
            if not columns:
                # What the rows do have is what the message about them should say.
                others = dict.fromkeys(sorted(present)[:5])
                for _ in range(file.metadata.num_rows):
                    yield dict(others)
                return
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns, use_threads=False):
                values = [_readable(pa, column) for column in batch.columns]
                for row in range(batch.num_rows):
                    try:
                        yield {
                            name: _value(column[row]) for name, column in zip(batch.schema.names, values, strict=True)
                        }
                    except UnicodeDecodeError:
                        yield None
    except (pa.ArrowException, EOFError) as error:
        detail = " ".join(str(error).split())
        raise InputError(f"inputs: {path} is damaged or cut short ({detail:.100}); copy it again") from error
    except OSError as error:
        detail = " ".join(str(error.strerror or error).split())
        raise InputError(f"inputs: cannot read {path}: {detail:.100}") from error


def _readable(pa: Any, column: Any) -> Any:
    """Dictionary columns as the values that they stand for."""
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _value(scalar: Any) -> Any:
    value = scalar.as_py()
    return value.decode("utf-8") if isinstance(value, bytes) else value  # writers that do not mark text as text
