"""Long work: a thread that any tab can watch, cancel and come back to.

A job is found again by what it computes (`?job=` in the address): a reload, another tab and a second click all meet the
same one. Work reports through `Job.tick`, which the model calls before every forward (`WatchedModel`), so that it can
be stopped there and other sessions use the model in between. Work that can keeps a first answer on the way
(`Job.keep`): it is shown while the rest runs, and stays when the user stops it.
"""

from __future__ import annotations

import hashlib
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import streamlit as st

LEAST_PART = 24
_KEPT = 24
_POLL_SECONDS = 0.5


T = TypeVar("T")


class JobCancelled(Exception):  # noqa: N818 - an order, not an error
    """The user stopped the job."""


@dataclass
class Job:
    """One computation. `total` forwards are expected; `error` says why it failed.

    `result` is the last thing kept; `partial` says what it was made from, and is empty once the work has ended well.
    """

    name: str
    label: str
    total: int
    done: int = 0
    result: Any = None
    partial: str = ""
    error: str = ""
    details: str = ""
    status: str = "running"
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    stop: threading.Event = field(default_factory=threading.Event)

    def tick(self) -> None:
        """Count one forward.

        Raises: JobCancelled when the user has stopped the job.
        """
        if self.stop.is_set():
            raise JobCancelled
        self.done += 1

    def keep(self, result: object, made_from: str) -> None:
        """Keep an answer to a part of the question, such as that of the first sentences."""
        self.result, self.partial = result, made_from

    @property
    def elapsed(self) -> float:
        """Seconds from the start, to the end where there is one."""
        return self.seconds or time.monotonic() - self.started

    @property
    def fraction(self) -> float:
        """How much of the expected forwards is done."""
        return min(1.0, self.done / max(1, self.total))

    def remaining(self) -> str:
        """Time left, by the rate so far."""
        if not self.done or self.done >= self.total:
            return "finishing" if self.done else "starting"
        seconds = (time.monotonic() - self.started) / self.done * (self.total - self.done)
        return f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"


@st.cache_resource(max_entries=1, show_spinner=False)
def _registry() -> tuple[OrderedDict[str, Job], threading.Lock]:
    return OrderedDict(), threading.Lock()


def first_part(items: Sequence[T]) -> tuple[T, ...]:
    """Every eighth item, from which a first answer is made; nothing where that would be too few for an interval."""
    part = tuple(items[::8])
    return part if len(part) >= LEAST_PART else ()


def job_name(*parts: object) -> str:
    """The name of a computation: a hash of everything it depends on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def find(name: str) -> Job | None:
    """A job by name."""
    return _registry()[0].get(name)


def start(name: str, label: str, total: int, work: Callable[[Job], object]) -> Job:
    """Start a job, or meet the one that runs or succeeded under this name."""
    jobs, lock = _registry()
    with lock:
        job = jobs.get(name)
        if job is not None and job.status in ("running", "done"):
            return job
        job = jobs[name] = Job(name, label, total)
        jobs.move_to_end(name)
        finished = [key for key, old in jobs.items() if old.status != "running"]
        for key in finished[: max(0, len(jobs) - _KEPT)]:
            del jobs[key]
        threading.Thread(target=_run, args=(job, work), name=f"job-{name}", daemon=True).start()
    return job


def _run(job: Job, work: Callable[[Job], object]) -> None:
    try:
        job.result, job.partial = work(job), ""
        job.status = "done"
    except JobCancelled:
        job.status = "cancelled"
    except Exception as error:  # noqa: BLE001 - shown to the user, whatever it is
        job.error, job.details, job.status = (
            " ".join(str(error).split()) or type(error).__name__,
            traceback.format_exc(),
            "failed",
        )
    finally:
        job.seconds = time.monotonic() - job.started


def run_button(name: str, label: str, total: int, work: Callable[[Job], object]) -> Job | None:
    """A button that starts the job, its progress while it runs, and its end; the job once it has a result, if only of a
    part.
    """
    job = find(name)
    if job is None or job.status in ("cancelled", "failed"):
        if job is not None:
            _ended_early(job)
        if not st.button(label, type="primary", key=f"run_{name}"):
            return job if job is not None and job.result is not None else None
        job = start(name, label, total, work)
    st.query_params["job"] = name
    if job.status == "running":
        _watch(name, job.partial)
    elif job.status != "done":
        st.rerun()
    return job if job.result is not None else None


def _ended_early(job: Job) -> None:
    kept = f"What follows is from {job.partial} alone." if job.partial else "Nothing was kept."
    if job.status == "cancelled":
        st.info(f"Cancelled after {job.done} of {job.total} forwards. {kept}")
        return
    st.error(job.error, icon=":material/error:")
    with st.expander("Details for a report"):
        st.code(job.details, language=None)


@st.fragment(run_every=_POLL_SECONDS)
def _watch(name: str, shown: str) -> None:
    job = find(name)
    if job is None or job.status != "running" or job.partial != shown:
        st.rerun()
    assert job is not None
    if shown:
        st.caption(f"So far, from {shown}:")
    st.progress(job.fraction, text=f"{job.label}: {job.done} of {job.total} forwards, {job.remaining()}")
    if st.button("Cancel", key=f"cancel_{name}", icon=":material/stop_circle:", disabled=job.stop.is_set()):
        job.stop.set()
