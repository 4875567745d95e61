"""What a page about a trace says is what the trace has."""

from __future__ import annotations

import gzip
import json

from ditty_di.loggers.trace import summarize, write_summary


def event(name, start, end, cat="kernel", tid=7):
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "tid": tid}


STEP = event("ProfilerStep#4", 0, 100, "user_annotation", tid=1)


def test_times_of_a_device_with_known_overlaps():
    summary = summarize(
        [
            STEP,
            event("aten::mm", 0, 10, "cpu_op", tid=1),
            event("gemm", 10, 40),
            event("gemm", 60, 70),
            event("ncclDevKernel_AllReduce_Sum", 30, 65, tid=9),  # alone from 40 to 60
            event("ncclDevKernel_AllReduce_Sum", 95, 110, tid=9),  # ends after the step does
            event("Memcpy HtoD", 64, 66, "gpu_memcpy", tid=9),
            {"ph": "i", "name": "a mark", "ts": 5},
        ]
    )
    assert summary.window == 110
    assert summary.busy == 30 + 10 and summary.gap == 40  # from 70 to the end
    assert summary.communication == 35 + 15 and summary.exposed == 20 + 15
    assert summary.kernels == {"gemm": 40, "ncclDevKernel_AllReduce_Sum": 50, "Memcpy HtoD": 2}
    assert summary.operators == {"aten::mm": 10} and summary.calls["gemm"] == 2
    page = str(summary)
    assert "idle                         0.070 ms   63.6%, at most 0.040 ms at a time" in page
    assert "  of it exposed              0.035 ms   31.8%" in page


def test_without_a_device_operators_compute_in_the_time_that_is_their_own():
    summary = summarize(
        [
            STEP,
            event("aten::linear", 0, 50, "cpu_op", tid=1),
            event("aten::t", 0, 5, "cpu_op", tid=1),
            event("aten::addmm", 10, 40, "cpu_op", tid=1),
            event("c10d::allreduce_", 50, 80, "cpu_op", tid=1),  # waits, and computes nothing
            event("gloo:all_reduce", 45, 78, "user_annotation", tid=2),
            event("FSDP::post_backward", 60, 90, "user_annotation", tid=1),
        ]
    )
    assert summary.operators["aten::linear"] == 15
    assert summary.operators["aten::addmm"] == 30 and summary.operators["aten::t"] == 5
    assert summary.busy == 50 and summary.communication == 35 and summary.exposed == 30
    assert not summary.kernels and summary.gap == 50
    assert summary.collectives == {"c10d::allreduce_": 30, "gloo:all_reduce": 33}


def test_a_trace_without_events_and_a_broken_one_end_no_training(tmp_path, caplog):
    trace = tmp_path / "rank0_trace.json.gz"
    trace.write_bytes(gzip.compress(json.dumps({"traceEvents": []}).encode()))
    write_summary(str(trace))
    assert "computing" in (tmp_path / "rank0_trace.txt").read_text()
    trace.write_bytes(b"half a file")
    write_summary(str(trace))
    (said,) = caplog.messages
    assert said.startswith(f"no summary of the trace {trace} (BadGzipFile")


def test_a_plain_file_is_read_too(tmp_path):
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"traceEvents": [STEP, event("gemm", 0, 50)]}))
    write_summary(str(trace))
    lines = (tmp_path / "trace.txt").read_text().splitlines()
    assert lines[0] == "trace.json"
    assert any(line.split() == ["0.050", "50.0%", "1", "gemm"] for line in lines)
