"""What the memory probes say of rows and reads equals what the model itself computes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from engram_interp.memory.access import rows_for_hit_rates, zipf_curve
from engram_interp.memory.address import (
    addresses_of_ngram,
    compress,
    windows,
)
from engram_interp.memory.in_memory_rows import InMemoryRows
from engram_interp.memory.ngram_counts import count_ngrams, readers_of_slot
from engram_interp.memory.row_reader import RowIndexError, TableError
from engram_interp.models.house import HouseModel
from engram_interp.probes.collisions import slot_collisions
from engram_interp.probes.memory_rows import access_report, diff_tables, row_statistics
from engram_interp.probes.memory_site import site_of
from engram_interp.probes.memory_table import lookup, neighbours, read_slot


def hashed_texts(model: HouseModel, texts: tuple[str, ...]) -> list[np.ndarray]:
    return [model.to_tokens(text)[0].numpy() for text in texts]


# -- access ------------------------------------------------------------------------------------------------------------


def test_access_counts_equal_what_the_model_reads(tiny_engram: HouseModel, texts: tuple[str, ...]) -> None:
    report = access_report(tiny_engram, texts, block=3, hit_rates=(0.5, 0.9, 1.0))
    reads: Counter = Counter()
    tokens = 0
    for text in texts:
        _, cache = tiny_engram.run_with_cache(tiny_engram.to_tokens(text), "blocks.3.engram.hook_slots")
        slots = cache["blocks.3.engram.hook_slots"]
        tokens += slots.shape[1]
        reads.update(tiny_engram.engram(3).ngram_hash.rows_of_slots(slots).flatten().tolist())
    assert (report.tokens, report.reads, report.rows_read) == (tokens, 8 * tokens, len(reads))
    assert {row: count for row, _, _, count in report.hottest}.items() <= reads.items()
    assert report.hottest[0][3] == max(reads.values())
    for rate, kept in zip(report.hit_rates, report.rows_for_rate, strict=True):
        ranked = sorted(reads.values(), reverse=True)
        assert sum(ranked[:kept]) >= rate * report.reads - 1e-6 > sum(ranked[: kept - 1])


def test_zipf_exponent_and_cache_sizes_of_a_known_curve() -> None:
    reads = (1e9 * np.arange(1, 5001) ** -1.2).astype(np.int64)
    generator = np.random.default_rng(0)
    curve = zipf_curve(np.concatenate([generator.permutation(reads), np.zeros(100, dtype=np.int64)]))
    assert curve.exponent == pytest.approx(1.2, abs=1e-3)
    assert (curve.rank[0], curve.rank[-1], curve.reads[0]) == (1, 5000, 10**9)
    assert rows_for_hit_rates(np.array([0, 1, 6, 3]), (0.1, 0.6, 0.61, 1.0)).tolist() == [1, 1, 2, 3]
    with pytest.raises(ValueError, match=r"\(0, 1\], found 0"):
        rows_for_hit_rates(reads, (0.0,))
    with pytest.raises(ValueError, match="at least one read"):
        zipf_curve(np.zeros(3, dtype=np.int64))


# -- rows --------------------------------------------------------------------------------------------------------------


def test_lookup_shows_the_rows_the_model_reads(tiny_engram: HouseModel) -> None:
    text = "Alexander the Great"
    result = lookup(tiny_engram, text)
    tokens = tiny_engram.to_tokens(text)
    for block in (1, 3):
        _, cache = tiny_engram.run_with_cache(tokens, f"blocks.{block}.engram.hook_*")
        slots = cache[f"blocks.{block}.engram.hook_slots"][0]
        norms = cache[f"blocks.{block}.engram.hook_embedding"][0].unflatten(-1, (8, 4)).norm(dim=-1)
        for reading in (r for r in result.ngrams if r.block == block):
            chosen = slice(4 * (reading.order - 2), 4 * (reading.order - 1))
            assert [a.slot for a in reading.addresses] == slots[reading.position, chosen].tolist()
            assert np.allclose(reading.norms, norms[reading.position, chosen].numpy())
    assert len(result.ngrams) == 2 * 2 * tokens.shape[1]
    last = next(r for r in result.ngrams if r.position == tokens.shape[1] - 1 and r.order == 3)
    assert last.complete
    assert tiny_engram.vocabulary.texts[last.ids[-1]] == last.ngram[-1]
    with pytest.raises(ValueError, match="empty text"):
        lookup(tiny_engram, "")


def test_a_row_reads_through_its_own_block_of_the_value_projection(
    tiny_engram: HouseModel, texts: tuple[str, ...]
) -> None:
    memory = tiny_engram.engram(3)
    corpus = count_ngrams(memory.ngram_hash, hashed_texts(tiny_engram, texts))
    row = memory.ngram_hash.offsets[6] + 17  # order 3, head 2
    reading = read_slot(tiny_engram, row, block=3, top=5, index=corpus)
    embedding = torch.zeros(8, 4)
    embedding[6] = memory.table.weight[row]
    value = memory.value_proj(embedding.flatten())
    logits = tiny_engram.unembed(value)
    logits = logits - logits.mean()
    assert (reading.address.order, reading.address.head, reading.address.slot) == (3, 2, 17)
    assert reading.value_norm == pytest.approx(float(value.norm()), rel=1e-5)
    assert [t.token_id for t in reading.promoted] == logits.topk(5).indices.tolist()
    assert [t.logit for t in reading.promoted] == pytest.approx(logits.topk(5).values.tolist(), rel=1e-4)
    assert [t.token_id for t in reading.suppressed] == logits.topk(5, largest=False).indices.tolist()
    mean_row = torch.zeros(8, 4)
    mean_row[6] = memory.table.weight[memory.ngram_hash.offsets[6] :][: memory.ngram_hash.sizes[6]].mean(0)
    control = tiny_engram.unembed(memory.value_proj(mean_row.flatten()))
    control = control - control.mean()
    first = reading.promoted[0]
    assert first.excess == pytest.approx(float(logits[first.token_id] - control[first.token_id]), abs=1e-4)
    expected = readers_of_slot(corpus, memory.ngram_hash, 3, 2, 17)
    assert [count for _, count in reading.ngrams] == expected.count[:5].tolist()
    with pytest.raises(ValueError, match="expected a row"):
        read_slot(tiny_engram, memory.ngram_hash.rows, block=3)


@pytest.mark.parametrize("chunk", [7, 10**6])
def test_neighbours_equal_a_full_comparison(
    chunk: int, monkeypatch: pytest.MonkeyPatch, fresh_engram: HouseModel
) -> None:
    monkeypatch.setattr("engram_interp.memory.row_reader.CHUNK_BYTES", 16 * chunk)
    memory = fresh_engram.engram(1)
    start, stop = memory.ngram_hash.offsets[2], memory.ngram_hash.offsets[3]
    with torch.no_grad():
        memory.table.weight[start + 3] = 0
        memory.table.weight[start + 9] = 3 * memory.table.weight[start + 5]
    found = neighbours(site_of(fresh_engram, 1), start + 5, top=6)
    rows = memory.table.weight.detach()[start:stop]
    cosine = torch.nn.functional.cosine_similarity(rows, rows[5:6])
    cosine[5] = -2
    assert list(found.rows) == (start + cosine.topk(6).indices).tolist()
    assert found.rows[0] == start + 9
    assert found.cosines == pytest.approx(cosine.topk(6).values.tolist(), abs=1e-6)
    with pytest.raises(ValueError, match="norm 0"):
        neighbours(site_of(fresh_engram, 1), start + 3)
    whole = neighbours(InMemoryRows(memory.table.weight), start + 5, top=10**6)
    assert whole.searched == memory.ngram_hash.rows
    assert len(whole.rows) == whole.searched - 2  # all but the row itself and the zero row
    with pytest.raises(RowIndexError, match="found 99999"):
        neighbours(InMemoryRows(memory.table.weight), 99999)


def test_row_statistics_see_every_row_of_a_head(fresh_engram: HouseModel) -> None:
    memory = fresh_engram.engram(1)
    start, stop = memory.ngram_hash.offsets[5], memory.ngram_hash.offsets[6]
    with torch.no_grad():
        memory.table.weight[start] = 0
        memory.table.weight[start + 1, 2] = torch.nan
        memory.table.weight[start + 2, 1] = torch.inf
    head = row_statistics(site_of(fresh_engram, 1)).heads[5]
    norms = memory.table.weight.detach()[start:stop].norm(dim=1).numpy().astype(np.float64)
    finite = norms[np.isfinite(norms)]
    assert (head.order, head.head, head.rows, head.zero, head.not_finite) == (3, 1, stop - start, 1, 2)
    assert (head.mean, head.deviation) == pytest.approx((finite.mean(), finite.std()))
    assert head.quantiles == pytest.approx(np.quantile(finite, (0, 0.01, 0.25, 0.5, 0.75, 0.99, 1)).tolist())
    sampled = row_statistics(site_of(fresh_engram, 1), sample=20, seed=1)
    assert [h.read for h in sampled.heads] == [20] * 8
    assert sampled.heads == row_statistics(site_of(fresh_engram, 1), sample=20, seed=1).heads


def test_changed_rows_are_found_with_their_heads(fresh_engram: HouseModel, tiny_engram: HouseModel) -> None:
    memory = fresh_engram.engram(1)
    edited = [memory.ngram_hash.offsets[1] + 4, memory.ngram_hash.offsets[7]]
    with torch.no_grad():
        memory.table.weight[edited[0]] *= -2
        memory.table.weight[edited[1], 0] += 1
    result = diff_tables(site_of(tiny_engram, 1), site_of(fresh_engram, 1))
    before = tiny_engram.engram(1).table.weight[edited].norm(dim=1)
    assert result.diff.rows.tolist() == edited
    assert list(zip(result.order.tolist(), result.head.tolist(), strict=True)) == [(2, 1), (3, 3)]
    assert result.diff.change.tolist() == pytest.approx([3 * float(before[0]), 1.0], rel=1e-5)
    assert float(result.diff.cosine[0]) == pytest.approx(-1, abs=1e-6)
    assert len(diff_tables(site_of(tiny_engram, 1), site_of(tiny_engram, 1)).table()) == 0
    with pytest.raises(TableError, match="one shape"):
        diff_tables(InMemoryRows(torch.zeros(2, 3)), InMemoryRows(torch.zeros(3, 3)))


def test_every_result_has_a_table_a_figure_and_plain_data(tiny_engram: HouseModel, texts: tuple[str, ...]) -> None:
    site = site_of(tiny_engram, 1)
    results = [
        slot_collisions(tiny_engram, texts),
        access_report(tiny_engram, texts),
        lookup(tiny_engram, "Alexander the Great", block=1),
        read_slot(tiny_engram, 7),
        neighbours(site, 7),
        row_statistics(site),
        diff_tables(site, InMemoryRows(tiny_engram.engram(1).table.weight * 1.5)),
    ]
    for result in results:
        assert len(result.table()) > 0
        figure = result.figure()
        assert isinstance(figure, go.Figure)
        assert figure.layout.title.text
        json.loads(json.dumps(result.as_dict(), allow_nan=False))
        assert result.provenance.created
    assert isinstance(results[0].load_figure(), go.Figure)


# -- other people's models and the command line ------------------------------------------------------------------------


def test_a_raw_published_layout_is_looked_up_as_recorded(shared: Path) -> None:
    from engram_interp.models.adapters.opening import open_model

    directory = shared / "vectors" / "deepseek_v41_a"
    model = open_model(directory)
    recorded = np.load(directory / "recorded.npz")
    site = site_of(model)
    name = next(key for key in recorded.files if "hash_ids" in key and str(site.block) in key)
    tokens = recorded["input_ids"][0].astype(np.int64)
    ngram_hash = site.engram.ngram_hash
    compressed = compress(ngram_hash, tokens)
    for n, window in enumerate(windows(ngram_hash, compressed)):
        for t in range(len(tokens)):
            rows = [a.row for a in addresses_of_ngram(ngram_hash, site.block, window.ids[t].tolist())]
            slots = [a.slot for a in addresses_of_ngram(ngram_hash, site.block, window.ids[t].tolist())]
            chosen = recorded[name][0, t, n * site.heads : (n + 1) * site.heads].tolist()
            assert chosen in (rows, slots)
    result = lookup(model, "Alexander the Great", block=site.block)
    assert len(result.ngrams) == len(result.tokens) * len(site.orders)
    assert all(norm > 0 for reading in result.ngrams for norm in reading.norms)
    with pytest.raises(ValueError, match="expected one unembedding"):
        read_slot(model, 0)
    alone = read_slot(model, 3, vocab=False)
    assert alone.norm == pytest.approx(float(np.linalg.norm(site.rows.read(np.array([3])))))
    assert alone.promoted == ()
    assert alone.table()["row"].tolist() == [3]


def test_commands_print_json_and_tables(
    tiny_engram: HouseModel, texts: tuple[str, ...], tmp_path: Path, capsys
) -> None:
    import zstandard

    from engram_interp.models.checkpoint import save_model
    from engram_interp.probes import memory_commands as commands

    model = tmp_path / "model"
    save_model(tiny_engram, tiny_engram.tokenizer, model)
    corpus = tmp_path / "corpus.jsonl.zst"
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    corpus.write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))

    def ask(command, *args: object, **options: object) -> dict:
        assert command(*args, json=True, **options) == 0
        return json.loads(capsys.readouterr().out)

    path, index = str(model), tmp_path / "index"
    assert ask(commands.run_lookup, path, "the sea")["tokens"][-1].strip() == "sea"
    direct = ask(commands.run_collisions, path, corpus)
    indexed = ask(commands.run_collisions, path, corpus, index=index)
    assert direct["heads"] == indexed["heads"] == ask(commands.run_collisions, path, corpus, index=index)["heads"]
    assert ask(commands.run_access, path, corpus, index=index)["tokens"] == direct["tokens"]
    hottest = ask(commands.run_access, path, corpus)["hottest"][0][0]
    assert ask(commands.run_read, path, hottest, index=index)["ngrams"]
    ngram, count = ask(commands.run_read, path, hottest, vocab=False, index=index)["ngrams"][0]
    assert commands.run_read(path, hottest, vocab=False, index=index) == 0
    assert f"{count} {ngram}" in capsys.readouterr().out
    assert [h["read"] > 0 for h in ask(commands.run_rows, path)["heads"]] == [True] * 8
    assert [h["read"] for h in ask(commands.run_rows, path, stats=False)["heads"]] == [0] * 8
    weights = str(model / "model.safetensors")
    bare = ask(commands.run_rows, weights, tensor="blocks.1.engram.table.weight")
    assert bare["heads"][0]["rows"] == tiny_engram.engram(1).ngram_hash.rows
    assert ask(commands.run_neighbours, path, 3, top=2)["searched"] == tiny_engram.engram(1).ngram_hash.sizes[0]
    changed = ask(commands.run_diff, weights, weights, tensor="blocks.1.engram.table.weight")
    assert (changed["changed"], changed["compared"]) == (0, tiny_engram.engram(1).ngram_hash.rows)
    assert commands.run_diff(weights, weights, tensor="blocks.1.engram.table.weight") == 0
    assert f"compared {changed['compared']}" in (said := capsys.readouterr().out) and "changed 0" in said
    assert commands.run_rows(path, out=tmp_path / "rows.html") == 0
    assert "plotly" in (tmp_path / "rows.html").read_text()
    assert commands.run_lookup(path, "the sea") == 0
    assert "ngram" in capsys.readouterr().out
    with pytest.raises(ValueError, match="ending in"):
        commands.run_rows(path, out=tmp_path / "rows.pdf")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"title": "b"}\n')
    with pytest.raises(ValueError, match="line 2"):
        list(commands.read_texts(tmp_path / "bad.jsonl"))
