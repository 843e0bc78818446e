"""Are the dashboard's long jobs found again, stopped, and honest about how they ended?"""

# ruff: noqa: F401, F811 - fixtures are imported and then named by tests
from __future__ import annotations

import threading
import time

import pytest

pytest.importorskip("streamlit", reason="the dashboard needs the extra `app`")

from tests.app_session import directories, open_app


@pytest.fixture
def jobs(open_app):
    """The module of jobs, as the application imports it."""
    open_app("runs")
    import jobs

    return jobs


def wait_for(job) -> None:
    deadline = time.monotonic() + 20
    while job.status == "running" and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_job_is_found_by_what_it_computes_and_can_be_cancelled(jobs):
    gate = threading.Event()

    def work(job):
        for _ in range(1000):
            job.tick()
            gate.wait(0.01)

    name = jobs.job_name("a", 1)
    job = jobs.start(name, "label", 1000, work)
    assert jobs.start(name, "label", 1000, work) is job and jobs.find(name) is job
    job.stop.set()
    wait_for(job)
    assert job.status == "cancelled" and 0 <= job.done < 1000
    assert jobs.start(name, "label", 1000, lambda _: 7) is not job


def test_a_failed_job_says_why_in_one_line(jobs):
    def work(_):
        raise ValueError("expected\n  four documents")

    job = jobs.start(jobs.job_name("b"), "label", 1, work)
    wait_for(job)
    assert (job.status, job.error) == ("failed", "expected four documents") and "ValueError" in job.details
    done = jobs.start(jobs.job_name("c"), "label", 1, lambda _: 7)
    wait_for(done)
    assert (done.status, done.result) == ("done", 7)
