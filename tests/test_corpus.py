"""Corpora: what is read, what is refused and where, and that a token file is what its header says."""

from __future__ import annotations

import dataclasses
import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import zstandard
from tokenizers import Tokenizer

from engram_interp.training.corpus import (
    EOS_ID,
    SPECIAL_TOKENS,
    CorpusError,
    Document,
    is_held_out,
    open_token_file,
    read_documents,
    read_jsonl,
    tokenizer_hash,
    train_tokenizer,
    write_token_file,
)

RECORDS = [{"title": f"t{i}", "text": f"The river number {i} flows to the sea. é 東"} for i in range(300)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("frames", [0, 1, 3])
def test_plain_and_zstd_files_hold_the_same_records(tmp_path: Path, frames: int) -> None:
    if frames == 0:
        path = write(tmp_path / "c.jsonl", LINES)
    else:
        cuts = np.linspace(0, len(LINES), frames + 1).astype(int)
        parts = [zstandard.compress(LINES[a:b]) for a, b in pairwise(cuts)]
        path = write(tmp_path / "c.jsonl.zst", b"".join(parts))
    assert list(read_jsonl(path)) == RECORDS
    assert [d.text for d in read_documents([path, path])] == [r["text"] for r in RECORDS] * 2


def test_a_reader_may_stop_early(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl.zst", zstandard.compress(LINES))
    reader = read_jsonl(path)
    assert next(reader) == RECORDS[0]
    reader.close()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"line 3: not JSON"),
        ("", r"line 3: not JSON"),
        ("[1, 2]", r"line 3: expected a JSON object, found list"),
        ('{"title": "x"}', r"line 3: expected a string under 'text', found NoneType"),
        ('{"text": 7}', r"line 3: expected a string under 'text', found int"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str, packed: bool) -> None:
    data = b"".join(LINES.splitlines(keepends=True)[:2]) + line.encode() + b"\n" + LINES
    path = tmp_path / ("c.jsonl.zst" if packed else "c.jsonl")
    write(path, zstandard.compress(data) if packed else data)
    read = []
    with pytest.raises(CorpusError, match=message) as caught:
        read.extend(read_documents([path]))
    assert str(path) in str(caught.value)


def test_damaged_files_are_errors_not_short_corpora(tmp_path: Path) -> None:
    whole = zstandard.ZstdCompressor(write_checksum=True).compress(LINES)
    damaged = {
        "cut": whole[: len(whole) // 2],
        "without its end": whole[:-4],
        "empty": b"",
        "not zstd": LINES,
        "one byte changed": whole[:60] + bytes([whole[60] ^ 255]) + whole[61:],
        "second frame cut": whole + whole[:40],
    }
    for name, data in damaged.items():
        with pytest.raises(CorpusError, match=r"c\.jsonl\.zst, (after )?line \d+"):
            list(read_jsonl(write(tmp_path / "c.jsonl.zst", data)))
            pytest.fail(name)
    with pytest.raises(CorpusError, match="line 2: not UTF-8"):
        list(read_jsonl(write(tmp_path / "c.jsonl", LINES.splitlines(keepends=True)[0] + b'{"text": "\xff\xfe"}\n')))
    with pytest.raises(CorpusError, match="no such file"):
        list(read_jsonl(tmp_path / "absent.jsonl"))
    with pytest.raises(CorpusError, match="no such file"):
        list(read_jsonl(tmp_path / "absent.jsonl.zst"))


def test_without_zstandard_a_packed_file_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = write(tmp_path / "c.jsonl.zst", zstandard.compress(LINES))
    with pytest.raises(CorpusError, match=r"c\.jsonl\.zst: packed.*pip install 'engram-interp\[training\]'"):
        list(read_jsonl(path))
    assert len(list(read_jsonl(write(tmp_path / "c.jsonl", LINES)))) == LINES.count(b"\n")


def test_the_split_keeps_one_title_in_a_hundred_apart() -> None:
    titles = [f"title {i}" for i in range(20_000)]
    share = sum(map(is_held_out, titles)) / len(titles)
    assert share == pytest.approx(0.01, abs=0.003)
    assert [is_held_out(t) for t in titles[:200]] == [is_held_out(t) for t in titles[:200]]


def test_a_token_file_holds_every_document_and_its_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = write(tmp_path / "c.jsonl", LINES)
    train = write_token_file(tmp_path / "train.bin", [corpus], tokenizer)
    held = write_token_file(tmp_path / "held.bin", [corpus], tokenizer, held_out=True)
    assert train.documents + held.documents == 300
    assert held.documents == sum(is_held_out(r["title"]) for r in RECORDS)
    tokens, header = open_token_file(tmp_path / "train.bin", tokenizer_hash(tokenizer))
    assert header == train
    assert header.sources == ("c.jsonl",)
    kept = [r["text"] for r in RECORDS if not is_held_out(r["title"])]
    expected = [token for text in kept for token in [*tokenizer.encode(text).ids, EOS_ID]]
    np.testing.assert_array_equal(tokens, np.array(expected, dtype=np.uint16))
    assert header.tokens == len(expected)
    assert not (tmp_path / "train.bin.part").exists()


def test_a_limit_ends_at_a_batch(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = write(tmp_path / "c.jsonl", LINES)
    header = write_token_file(tmp_path / "t.bin", [corpus], tokenizer, batch=10, limit=100)
    assert header.documents % 10 == 0
    assert 100 <= header.tokens < 1000


def test_a_token_file_that_is_not_what_it_says_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "t.bin"
    header = write_token_file(path, [write(tmp_path / "c.jsonl", LINES)], tokenizer)
    with pytest.raises(CorpusError, match=f"made by another tokenizer.*{header.tokenizer_sha256[:12]}"):
        open_token_file(path, "0" * 64)
    data = path.read_bytes()
    for damaged in (data[:-2], data[:-1], data + b"\0\0", b""):
        path.write_bytes(damaged)
        with pytest.raises(CorpusError, match=f"header says {header.tokens} tokens, the file holds"):
            open_token_file(path)
    path.unlink()
    with pytest.raises(CorpusError, match="no token file here"):
        open_token_file(path)
    path.write_bytes(data)
    beside = tmp_path / "t.bin.json"
    for damaged in ("{", "[]", "{}", json.dumps(dataclasses.asdict(header) | {"extra": 1})):
        beside.write_text(damaged)
        with pytest.raises(CorpusError, match="not the header of a token file"):
            open_token_file(path)
    beside.unlink()
    with pytest.raises(CorpusError, match="no token file here"):
        open_token_file(path)


def test_the_tokenizer_is_byte_level_and_starts_with_the_special_tokens(tokenizer: Tokenizer) -> None:
    assert [tokenizer.id_to_token(i) for i in range(3)] == list(SPECIAL_TOKENS)
    for text in ("Zürich 東京 🙂\n\ttab", "  two spaces", "<eos> is not special in a text"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if "<eos>" not in text:
            assert tokenizer.decode(ids, skip_special_tokens=False) == text
    again = train_tokenizer([Document("aaa bbb aaa", "x")] * 5, 280)
    other = train_tokenizer([Document("ccc ddd ccc", "x")] * 5, 280)
    assert tokenizer_hash(again) != tokenizer_hash(other)
    assert tokenizer_hash(again) == tokenizer_hash(Tokenizer.from_str(again.to_str()))
