"""Texts from files: JSON lines, packed or not, and plain lines. Streams; nothing is held but the line at hand."""

from __future__ import annotations

import io
import json
from collections.abc import Generator, Iterator
from pathlib import Path

_READ_BYTES = 2**17
_WINDOW_BYTES = 2**27  # the shared corpora are packed with a 128 MiB zstd window


class CorpusError(ValueError):
    """A corpus file that cannot be read; the message names the file and the line."""


class _ZstdFrames(io.RawIOBase):
    """The bytes of a zstd file of any number of frames; a file that ends inside a frame is an error."""

    def __init__(self, path: Path) -> None:
        self._chunks = _decompressed(path)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest and (chunk := next(self._chunks, None)) is not None:
            self._rest = chunk
        taken = self._rest[: len(buffer)]
        self._rest = self._rest[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)

    def close(self) -> None:
        self._chunks.close()
        super().close()


def _decompressed(path: Path) -> Generator[bytes, None, None]:
    try:
        import zstandard
    except ModuleNotFoundError:
        raise CorpusError(f"{path}: packed files need zstandard: pip install 'engram-interp[training]'") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
    frame = decompressor.decompressobj()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            while chunk:
                if frame.eof:
                    frame = decompressor.decompressobj()
                yield frame.decompress(chunk)
                chunk = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise EOFError("the file ends inside a zstd frame")


def _open_lines(path: Path) -> io.BufferedReader:
    return io.BufferedReader(_ZstdFrames(path), _READ_BYTES) if path.suffix == ".zst" else path.open("rb")


def read_jsonl(path: Path) -> Iterator[dict]:
    """The objects of a `.jsonl` or `.jsonl.zst` file, one at a time.

    Raises: CorpusError naming file and line when a line is not a JSON object, or the file is not valid zstd or UTF-8.
    """
    number = 0
    try:
        with _open_lines(path) as lines:
            for number, line in enumerate(lines, start=1):
                record = json.loads(line.decode("utf-8"))
                if not isinstance(record, dict):
                    raise CorpusError(f"{path}, line {number}: expected a JSON object, found {type(record).__name__}")
                yield record
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}, line {number}: not UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise CorpusError(f"{path}, line {number}: not JSON ({error.msg})") from None
    except CorpusError:
        raise
    except FileNotFoundError:
        raise CorpusError(f"{path}: no such file") from None
    except Exception as error:  # noqa: BLE001 - zstandard.ZstdError, EOFError: both mean a damaged file
        raise CorpusError(f"{path}, after line {number}: damaged ({error})") from None


def read_texts(path: Path) -> Iterator[str]:
    """The `text` of every line of a `.jsonl` or `.jsonl.zst` file; of any other file every line that is not blank.

    Raises: CorpusError naming the file, and the line that holds no text.
    """
    if ".jsonl" in path.name:
        for number, record in enumerate(read_jsonl(path), start=1):
            if not isinstance(record.get("text"), str):
                raise CorpusError(f"{path}, line {number}: expected a string under 'text'")
            yield record["text"]
        return
    try:
        with _open_lines(path) as lines:
            for line in lines:
                if (text := line.decode("utf-8").strip("\r\n")).strip():
                    yield text
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: {error}") from None
