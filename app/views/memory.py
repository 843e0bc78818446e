"""Memory: what is stored where, and who shares a slot?"""

from __future__ import annotations

import jobs
import loaders
import page_parts
import state
import streamlit as st

from engram_interp.probes.collisions import CollisionResult, slot_collisions
from engram_interp.probes.memory_rows import row_statistics
from engram_interp.probes.memory_site import rows_of, site_of
from engram_interp.probes.memory_table import lookup, neighbours, read_slot

QUESTION = "What is stored where, and who shares a slot?"
PHRASE = "Alexander the Great"
LONGEST = 64


def show() -> None:
    """The page."""
    st.title(QUESTION)
    name = st.session_state["model"]
    with page_parts.readable_errors():
        model = loaders.model(name)
        if not getattr(model, "engram_layers", ()):
            page_parts.without_memory(name, QUESTION)
            return
        with st.container(horizontal=True, gap="medium"):
            blocks = [str(block) for block in model.engram_layers]
            state.forget_unless("block", blocks)
            st.segmented_control("Block", blocks, default=blocks[0], required=True, key="block", bind="query-params")
            st.text_input("Phrase", PHRASE, key="phrase", bind="query-params", width=420)
        block = int(st.session_state["block"])
        corpus, source = reference_corpus()
        found, row, crowd, sizes = st.tabs(["Phrase", "Row", "Collisions", "Row sizes"], key="memory_tab")
        with found, page_parts.readable_errors():
            show_phrase(model, st.session_state["phrase"], block)
        with row, page_parts.readable_errors():
            show_row(model, block, corpus, source)
        with crowd, page_parts.readable_errors():
            show_collisions(model, block, corpus, source)
        with sizes, page_parts.readable_errors():
            show_sizes(model, model.identity.weights_sha256, block)


def reference_corpus() -> tuple[tuple[str, ...], str]:
    """The texts whose n-grams are looked up in the slots, and their name: an uploaded file, else the gallery."""
    with st.expander("Reference corpus: a hash is inverted by a corpus alone"):
        file = st.file_uploader("A text file, one document per line (UTF-8, at most 20 MB)", type=["txt"], key="corpus")
    if file is None:
        return tuple(loaders.gallery_texts()), "the bundled gallery"
    lines = file.getvalue().decode("utf-8", errors="replace").splitlines()
    return tuple(line for line in lines if line.strip()), file.name


def show_phrase(model, phrase: str, block: int) -> None:  # noqa: ANN001
    """The rows a phrase addresses."""
    if not phrase.strip():
        st.info("Type a phrase above.")
        return
    if len(model.tokenizer.encode(phrase, add_special_tokens=False).ids) > LONGEST:
        st.warning(f"A phrase of at most {LONGEST} tokens can be shown here.")
        return
    result = lookup(model, phrase, block=block)
    page_parts.figure(result.figure(), "lookup", alt="Norm of every row the phrase addresses")
    page_parts.table(result.table(), "lookup", height=320)
    st.caption(
        "A slot is the row number inside its head; `row` numbers the whole table. Norms say how much a row can add."
    )
    page_parts.provenance_line(result.provenance)
    page_parts.exports(
        "memory-lookup", "lookup", csv=lambda: result.table().to_csv(index=False),
        json=lambda: page_parts.as_json(result.as_dict()),
        html=lambda: result.figure().to_html(),
    )  # fmt: skip


def show_row(model, block: int, corpus: tuple[str, ...], source: str) -> None:  # noqa: ANN001
    """One row: what it promotes, who reads it, which rows are like it."""
    site = site_of(model, block)
    rows = rows_of(site).rows
    row = st.number_input(f"Row (0 to {rows - 1})", 0, rows - 1, 0, key="row", bind="query-params", width=240)
    counts = loaders.corpus_counts(model, model.identity.weights_sha256, block, corpus)
    reading = read_slot(model, int(row), block=block, index=counts)
    left, right = st.columns(2)
    with left:
        page_parts.figure(reading.figure(), "promoted", alt="Tokens the row promotes and suppresses")
    with right:
        near = neighbours(site, int(row))
        page_parts.figure(near.figure(), "neighbours", alt="Rows nearest by cosine, in the same head")
        readers = ", ".join(f"`{text}` × {count}" for text, count in reading.ngrams) or "none"
        st.markdown(f"n-grams of {source} that read it: {readers}")
    st.caption(
        "Read directly at the memory's layer; the other rows of a position add to the same value, and the gate may "
        "close on it."
    )
    page_parts.provenance_line(reading.provenance)
    page_parts.exports(
        "memory-row", "row", csv=lambda: reading.table().to_csv(index=False),
        json=lambda: page_parts.as_json(reading.as_dict()),
        html=lambda: reading.figure().to_html(),
    )  # fmt: skip


def show_collisions(model, block: int, corpus: tuple[str, ...], source: str) -> None:  # noqa: ANN001
    """Collisions of a corpus in this memory, as a job."""
    weights = model.identity.weights_sha256

    def work(job: jobs.Job) -> CollisionResult:
        job.tick()
        return slot_collisions(model, corpus, block=block, inspect=0)

    job = jobs.run_button(
        jobs.job_name("collisions", weights, block, corpus), f"Count {source} ({len(corpus)} texts)", 1, work
    )
    if job is None:
        return
    result: CollisionResult = job.result
    left, right = st.columns(2)
    with left:
        page_parts.figure(
            result.figure(), "collisions", alt="Share of n-grams that share a slot, per head, beside a uniform hash"
        )
    with right:
        page_parts.figure(result.load_figure(), "loads", alt="Slots by load, beside a uniform hash")
    page_parts.table(result.table(), "collisions", height=320)
    st.caption(
        f"{result.tokens} tokens of {source}. Collisions grow with the corpus: compare corpora of one size only."
    )
    page_parts.provenance_line(result.provenance, f"{job.elapsed:.1f} s")
    page_parts.exports(
        "collisions", "collisions", csv=lambda: result.table().to_csv(index=False),
        json=lambda: page_parts.as_json(result.as_dict()),
        html=lambda: result.figure().to_html(),
    )  # fmt: skip


@st.cache_resource(max_entries=16, show_spinner="Measuring the rows")
def sizes_of(_model, weights: str, block: int):  # noqa: ANN001, ANN201
    """Row statistics, at most 20,000 rows per head."""
    return row_statistics(site_of(_model, block), sample=20_000)


def show_sizes(model, weights: str, block: int) -> None:  # noqa: ANN001
    """How large the rows are."""
    result = sizes_of(model, weights, block)
    page_parts.figure(result.figure(), "row_sizes", alt="Quantiles of row norms per head")
    page_parts.table(result.table(), "row_sizes", height=320)
    page_parts.provenance_line(result.provenance, "at most 20,000 rows per head")
    page_parts.exports("row-sizes", "sizes", csv=lambda: result.table().to_csv(index=False))


show()
