"""The joules of a GPU, by the counter of a made-up NVML."""
import math
import sys
import types

import pytest
import torch

from tools import energy, machine, processes, run

UUID = "5f3ed6ee-1c55-41f3-bc68-3b1d9a3a1c1f"
PERIOD = 0.1                            # of the counter, in seconds


class NVMLError(Exception):
    pass


class FakeNVML(types.ModuleType):
    """A machine with two GPUs, of which torch sees the second, in a time of its own.

    work(seconds, watts) is what the GPU does; it takes 100 W when it does nothing.
    """
    NVMLError = NVMLError
    missing = ""                        # the name of the function that fails
    is_stuck = False

    def __init__(self):
        super().__init__("pynvml")
        self.now = 0.04                 # The counter moves at 0, 0.1, 0.2 ...
        self.joules = 5000.             # since the driver was loaded
        self.shown = 5000.
        self.pending = []
        self.is_on = False

    def pass_time(self, seconds, watts=100):
        end = self.now + seconds
        while self.now < end - 1e-9:
            tick = (math.floor(self.now / PERIOD + 1e-9) + 1) * PERIOD
            step = min(tick, end) - self.now
            self.joules += step * watts
            self.now += step
            if self.now >= tick - 1e-9 and not self.is_stuck:
                self.shown = self.joules

    def work(self, seconds, watts):
        """Is launched, and done when someone waits for it."""
        self.pending.append((seconds, watts))

    def synchronize(self, device):
        assert device.startswith("cuda")
        for seconds, watts in self.pending:
            self.pass_time(seconds, watts)
        self.pending = []

    def fail_if_missing(self, name):
        if self.missing == name:
            raise NVMLError(name)

    def nvmlInit(self):
        self.fail_if_missing("init")
        self.is_on = True

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert self.is_on
        self.fail_if_missing("handle")
        return {"GPU-" + UUID: "mine"}[uuid]

    def nvmlDeviceGetHandleByIndex(self, index):
        raise AssertionError("NVML's numbers are not torch's")

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        assert handle == "mine"
        self.fail_if_missing("counter")
        return int(1000 * self.shown)


@pytest.fixture
def nvml(monkeypatch):
    nvml = FakeNVML()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: types.SimpleNamespace(uuid=UUID))
    monkeypatch.setattr(machine, "synchronize", nvml.synchronize)
    clock = types.SimpleNamespace(perf_counter=lambda: nvml.now, sleep=nvml.pass_time)
    monkeypatch.setattr(energy, "time", clock)
    monkeypatch.setattr(processes, "sums", lambda *values, device: list(values))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    return nvml


def test_ten_seconds_of_work_are_measured_to_a_hundredth_wherever_the_counter_stands(nvml):
    for offset in (0.001, 0.03, 0.05, 0.099):
        nvml.pass_time(offset)
        nvml.work(3, 700)               # It does not count: it was launched before.
        with energy.Meter("cuda:1") as meter:
            nvml.work(10.02, 500)       # The counter moves in between.
        assert 5010 <= meter.joules <= 5010 + PERIOD * 100 + 1e-2
        assert meter.watts == pytest.approx(500, rel=1e-2)
        assert 10.02 <= meter.seconds <= 10.02 + PERIOD + 3 * energy.POLL


def test_a_counter_moves_before_it_is_believed(nvml):
    # It shows what was up to a tenth of a second ago, when the GPU had other work.
    nvml.pass_time(0.01)
    nvml.pass_time(0.045, watts=10_000)
    with energy.Meter("cuda") as meter:
        nvml.work(0.1, 100)
    assert meter.joules <= 2.1 * PERIOD * 100 + 1e-2


def test_the_power_of_an_idle_gpu_is_that_of_some_seconds(nvml):
    nvml.work(2, 700)
    start = nvml.now
    assert energy.idle_watts("cuda", 3) == pytest.approx(100, rel=1e-3)
    assert nvml.now - start == pytest.approx(2 + 3 + PERIOD, abs=PERIOD + 5 * energy.POLL)


@pytest.mark.parametrize("missing", ["init", "handle", "counter"])
def test_a_gpu_without_a_counter_has_no_joules(nvml, missing):
    nvml.missing = missing
    with energy.Meter("cuda") as meter:
        nvml.work(1, 500)
    assert (meter.joules, meter.watts) == (None, None) and not nvml.pending
    assert energy.idle_watts("cuda", 3) is None and nvml.now < 3


def test_without_the_package_there_are_no_joules(nvml, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.counter("cuda") is None


def test_a_cpu_has_no_joules_and_nvml_is_not_even_looked_for(monkeypatch):
    with energy.Meter("cpu") as meter:
        pass
    assert meter.joules is None and energy.counter("cpu") is None


def test_a_counter_that_stands_still_counts_nothing(nvml):
    nvml.is_stuck = True
    with energy.Meter("cuda") as meter:
        nvml.work(10, 500)
    assert (meter.joules, meter.seconds) == (None, None)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_counter_that_is_lost_ends_no_run(nvml, when):
    meter = energy.Meter("cuda")
    nvml.missing = "counter" if when == "before" else ""
    with meter:
        nvml.missing = "counter"
    assert meter.joules is None


def test_what_fails_is_not_waited_for(nvml, monkeypatch):
    def broken(device):
        raise AssertionError("the GPU does not answer")

    with pytest.raises(ZeroDivisionError), energy.Meter("cuda"):
        monkeypatch.setattr(machine, "synchronize", broken)
        1 / 0


# ---- of a run

CFG = types.SimpleNamespace(device="cuda", jobs=1, batch=4, seq=32)


def test_a_run_has_taken_what_its_steps_have_and_that_is_said_a_token(nvml):
    history = []
    with energy.of_run(CFG, history) as spent:
        for step in range(5):
            nvml.work(10, 640)
            history.append(step)
    assert spent.n_tokens == 5 * 4 * 32
    assert 32_000 <= spent.joules <= 32_000 + PERIOD * 100 + 1e-2
    assert spent.energy == f"{spent.joules:.0f} J, 50 J a token"


def test_a_resumed_run_says_only_what_the_steps_since_then_have_taken(nvml):
    history = list(range(300))
    with energy.of_run(CFG, history) as spent:
        nvml.work(64, 100)
        history.append(300)
    assert spent.n_tokens == 128
    assert spent.energy.endswith(" J, 50.1 J a token, of the steps after 300")


def test_the_peak_of_a_run_s_memory_is_that_of_its_steps(nvml, monkeypatch):
    held = [9 * 2 ** 30]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: held.clear())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: max(held))
    with energy.of_run(CFG, []) as spent:
        held.append(2 ** 30)
    held.append(5 * 2 ** 30)            # of a sample, after the last step
    assert spent.memory == "1.00 GiB"


def test_small_numbers_keep_three_digits():
    spent = energy.Spent()
    spent.joules, spent.n_tokens = 123456.7, 224_000_000
    assert spent.energy == "123457 J, 0.000551 J a token"


def test_runs_that_share_a_gpu_do_not_claim_its_joules(nvml):
    history = []
    with energy.of_run(types.SimpleNamespace(**{**vars(CFG), "jobs": 2}), history) as spent:
        nvml.work(10, 640)
        history.append(0)
    assert spent.joules is None and spent.energy == "n/a"


def test_a_run_that_had_no_step_left_has_no_joules_a_token(nvml):
    with energy.of_run(CFG, [1, 2, 3]) as spent:
        pass
    assert spent.energy == "n/a"


def test_a_run_that_fails_has_no_joules_and_its_own_error(nvml):
    with pytest.raises(KeyError), energy.of_run(CFG, []):
        raise KeyError("loss")


@pytest.mark.parametrize("words", ["n/a", "512345 J, 0.000551 J a token",
                                   "5 J, 0.1 J a token, of the steps after 300"])
def test_the_last_line_of_a_log_says_the_joules_and_the_memory_is_read_as_before(words):
    text = ('# commit 1\n# config {"precision": "fp4", "name": "r", "size": "tiny", "data": "d", '
            '"seed": 0, "batch": 1, "seq": 1}\n# device GPU\nstep,loss,val,lr,norm,ms,'
            'tokens_per_s,mfu\n1,2,3,4,5,6,7,n/a\n')
    end = run.log_end("7.59 GiB", words)
    assert end.endswith(f", peak memory 7.59 GiB, energy {words}\n") and end.count("\n") == 1
    found = run.parse_log(text + end)
    assert found.memory == "7.59 GiB" and found.date in end
    # A log that was written before joules were counted.
    assert run.parse_log(text + "# finished 2026-01-02, peak memory n/a\n").memory == "n/a"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_work_takes_more_than_idling():
    if energy.counter("cuda") is None:
        pytest.skip("no counter: pip install nvidia-ml-py")
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    idle = energy.idle_watts("cuda", 2)
    with energy.Meter("cuda") as meter:
        for _ in range(10_000):
            a @ a
    assert 10 < idle < meter.watts < 2000
    assert meter.joules == pytest.approx(meter.watts * meter.seconds)
