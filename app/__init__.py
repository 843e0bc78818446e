"""The Streamlit dashboard; `engram-interp app` runs `main.py` beside this file."""
