"""benchmarks/chip.py, with Triton's interpreter in the place of a GPU, as far as that goes."""

import json
import time

import pytest
import torch
import typer

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime import interpreter

from benchmarks import chip, speed
from benchmarks.on_chip import bits, graphs, kernel_tests, memory, passes, shardings, steps, training
from benchmarks.on_chip.gpu import Gpu
from benchmarks.shapes import CATALOGUE
from novoscale import NovoGrad, kernels
from novoscale.kernels import dispatch
from novoscale.kernels import triton as triton_kernels

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make chip"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
CPU = torch.device("cpu")


class StandIn(Gpu):
    """The CPU. A capture is not one: what is replayed, runs."""

    device = CPU

    def __init__(self):
        self.launched = []

    def wait(self):
        pass

    def ran(self, run):
        self.launched.clear()
        start = time.perf_counter()
        run()
        return list(self.launched) or [("copy", 1e6 * (time.perf_counter() - start))]

    def allocated(self):
        return 0

    def free(self):
        return 1 << 30

    def peak(self, run):
        run()
        return 1 << 20

    def warm(self, run, times=3):
        for _ in range(times):
            run()

    def captured(self, run):
        return run

    def about(self):
        return {"name": "Triton's interpreter"}


@pytest.fixture
def gpu(monkeypatch):
    """Small, with the Triton kernels for tensors on the CPU, each launch noted."""
    stand_in, original = StandIn(), interpreter.InterpretedFunction.run

    def noted(self, *args, **kwargs):
        start = time.perf_counter()
        original(self, *args, **kwargs)
        stand_in.launched.append((self.fn.__name__, 1e6 * (time.perf_counter() - start)))

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", noted)
    monkeypatch.setattr(bits, "SHAPES", [(9, 20), (5,), (2, 3, 2, 2)])
    monkeypatch.setattr(graphs, "SHAPES", [(9, 20), (5,)])
    monkeypatch.setattr(graphs, "FEATURES", (4, 6, 3))
    monkeypatch.setattr(graphs, "REPLAYS", 2)
    monkeypatch.setattr(
        shardings, "CASES", {name: shardings.CASES[name] for name in ("FSDP2", "stage 2, bf16")}
    )
    monkeypatch.setattr(passes, "WARM", 1)
    monkeypatch.setattr(passes, "PROFILED", 1)
    monkeypatch.setattr(steps, "ROUNDS", 1)
    monkeypatch.setattr(steps, "STEPS", 1)
    monkeypatch.setattr(passes, "SHAPE", (70, 64))
    monkeypatch.setattr(speed, "COPY", 1 << 16)
    monkeypatch.setitem(CATALOGUE, "1000-small", lambda: [(4, 4)] * 3)
    monkeypatch.setattr(memory, "SHAPE", "1000-small")
    monkeypatch.setattr(steps, "CASES", (("1000-small", torch.float32),))
    monkeypatch.setattr(training, "FORMS", {k: training.FORMS[k] for k in ("float32", "adamw, int8")})
    monkeypatch.setitem(kernels.FUSED_DEVICES, "cpu", "triton")
    monkeypatch.setattr(triton_kernels, "load", lambda: None)
    dispatch._load.cache_clear()
    yield stand_in
    dispatch._load.cache_clear()


def test_without_a_gpu_it_says_so_at_once(capsys):
    with pytest.raises(typer.Exit) as ended:
        chip.main(None, 10, None)
    assert ended.value.exit_code == 2
    assert capsys.readouterr().err == f"make chip needs a GPU, and torch {torch.__version__} sees none.\n"


def test_an_unknown_part_is_refused():
    with pytest.raises(typer.BadParameter, match="no part sums; there are load, bits, graphs"):
        chip.main(["sums"], 10, None)


def test_every_part_finds_what_it_is_for(gpu, tmp_path, capsys):
    chosen = [name for name in chip.TITLES if name != "tests"]
    assert chip.measured(gpu, chosen, 1000, tmp_path), capsys.readouterr().out
    report = json.loads((tmp_path / "chip.json").read_text())
    assert {"commit", "versions", "machine"} <= report["provenance"].keys()
    parts = {name: found["rows"] for name, found in report["parts"].items()}
    assert list(parts) == chosen
    assert parts["load"][0]["fused kernel"] == "triton"
    assert [(r["weights"], r["form"], r["differ"], r["differ from the CPU's"]) for r in parts["bits"]] == [
        (dtype, form, 0, 0) for dtype in ("float32", "bfloat16") for form in training.FORMS
    ]
    assert [r["captured"] for r in parts["graphs"]] == [way for way in graphs.WAYS for _ in graphs.FORMS]
    assert [(r["ranks"], r["differ"]) for r in parts["shardings"]] == [(3, 0), (2, 0)]
    assert "not installed" in next(r["why"] for r in parts["steps"] if r["optimizer"].startswith("Apex"))
    assert next(r for r in parts["steps"] if r["optimizer"] == "torch AdamW, fused")["of AdamW fused"] == 1
    copy, read, *forms = parts["passes"]
    assert min(copy["GB/s"], read["GB/s"]) > 0
    assert len(forms) == 4
    assert all(min(r["update GB/s"], r["statistic GB/s"], r["all else us"], r["launches"]) > 0 for r in forms)
    assert (tmp_path / "chip.png").stat().st_size > 1000
    assert (tmp_path / "chip.svg").exists()


def test_a_failure_is_reported_and_stops_nothing_else(gpu, tmp_path, monkeypatch, capsys):
    def broken(gpu):
        yield {"row": 1}
        raise RuntimeError("an illegal address")

    monkeypatch.setattr(bits, "load", broken)
    monkeypatch.setattr(NovoGrad, "step", lambda self: None)
    monkeypatch.setattr(graphs, "replay", lambda gpu: iter([{"captured": "step"}]))
    assert not chip.measured(gpu, ["load", "graphs"], 1000, tmp_path)
    report = json.loads((tmp_path / "chip.json").read_text())["parts"]
    assert report["load"]["rows"] == [{"row": 1}]
    assert report["load"]["failed"] == "RuntimeError: an illegal address"
    assert report["graphs"]["rows"] == [{"captured": "step"}]
    assert "RuntimeError: an illegal address" in capsys.readouterr().out


def test_other_bits_are_a_failure(gpu, monkeypatch):
    trained = bits.trained

    def other(device, dtype, form, fused, steps=bits.STEPS):
        found = trained(device, dtype, form, fused, steps)
        if fused:
            found[-1]["exp_avg"][0].view(-1)[0] += 1
        return found

    monkeypatch.setattr(bits, "trained", other)
    row = next(bits.compare(gpu))
    assert row["failed"] == "other bits than the reference: 1 of exp_avg"


def test_a_replay_that_does_nothing_is_a_failure(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "captured", lambda run: lambda: None)
    assert all("failed" in row for row in graphs.replay(gpu))


def test_what_has_not_begun_in_time_is_left_out(gpu, tmp_path):
    assert not chip.measured(gpu, ["load"], -1, tmp_path)
    report = json.loads((tmp_path / "chip.json").read_text())
    assert report["parts"]["load"]["failed"] == "out of time"


def test_the_kernels_tests_are_counted():
    (row,) = kernel_tests.run(StandIn(), 100, "what_they_do_not_take or kept_alive")
    assert (row["passed"], row["failed_tests"], row["skipped"]) == (2, 0, 0)
    assert "failed" not in row


@pytest.mark.parametrize("code", [None, 1])
def test_the_kernels_tests_that_fail_are_named(monkeypatch, code):
    lines = [
        "[gw0] [ 50%] PASSED tests/kernels/triton/test_triton_elements.py::test_rows[int8-2-7] ",
        "[gw1] [ 99%] FAILED tests/kernels/triton/test_triton_check.py::test_a_triton_that_works_passes ",
    ]
    monkeypatch.setattr(kernel_tests, "ended", lambda command, seconds: (code, "\n".join(lines)))
    (row,) = kernel_tests.run(StandIn(), 100)
    assert (row["passed"], row["failed_tests"]) == (1, 1)
    assert row["failed"].endswith(
        ", tests/kernels/triton/test_triton_check.py::test_a_triton_that_works_passes"
    )


def test_the_kernels_tests_that_do_not_end_are_stopped():
    (row,) = kernel_tests.run(StandIn(), 0.1)
    assert row["failed"] == "stopped after 0 s"
