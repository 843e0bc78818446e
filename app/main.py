"""The dashboard: six pages, each titled with its question. Started by `engram-interp app`."""

from __future__ import annotations

from pathlib import Path

import loaders
import page_parts
import streamlit as st

PAGES = {
    "Gates": "views/gates.py",
    "Lens": "views/lens.py",
    "Similarity": "views/similarity.py",
    "Ablate": "views/ablate.py",
    "Memory": "views/memory.py",
    "Runs": "views/runs.py",
}

st.set_page_config(page_title="engram_interp", page_icon=str(Path(__file__).with_name("icon.png")), layout="wide")
page = st.navigation(
    [st.Page(path, title=title, default=title == "Gates") for title, path in PAGES.items()], position="top"
)
with st.sidebar:
    choices = loaders.model_choices()
    if choices:
        st.selectbox("Model", list(choices), key="model", bind="query-params", persist_state="session")
        page_parts.model_card(st.session_state["model"])
    st.caption("The address of this page is a link to what it shows.")
if choices:
    page.run()
else:
    page_parts.no_models()
