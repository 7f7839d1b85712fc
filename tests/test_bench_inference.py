"""The table of inference, of a small model on the CPU, whose time is made up."""
import pytest
import torch

import fp4
from model import PRESETS, Preset
from test_bench import OnTheCPU, cells
from tools import bench, bench_inference
from tools.bench_report import VOCABULARY

GIB = 2 ** 30


@pytest.fixture
def machine(monkeypatch):
    """Nothing is captured or timed: a prefill takes 4 ms, and everything else 2."""
    monkeypatch.setitem(PRESETS, "800M", Preset(2, 64, 2, lr=1e-3))
    monkeypatch.setattr(bench_inference, "PROMPT", 20)
    monkeypatch.setattr(bench_inference, "LENGTH", 32)
    monkeypatch.setattr(bench, "captured", lambda f: f)

    def burst(f, n_calls=1, repeats=2, name=""):
        def measure():
            f()
            return {name + "ms": 4. if name else 2.}
        return measure

    monkeypatch.setattr(bench, "burst", burst)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)


def test_prefill_and_decode_are_the_steps_of_a_text(machine):
    with OnTheCPU(), torch.no_grad():
        model = bench_inference.packed_model("800M", "fp4", fp4.build())
        prefill, decode = bench_inference.steps_of(model)
        prompt = prefill.args[0]
        expected = model(prompt)[:, -1]
        assert prompt.shape == (1, 20) and expected.shape == (1, VOCABULARY)
        # Activations are BF16, whose last bit is 2**-8.
        error = (prefill() - expected).norm() / expected.norm()
        assert error <= .02
        longer = torch.cat((prompt, prompt[:, :1]), 1)
        expected = model(longer)[:, -1]
        for _ in range(2):              # A replay repeats the step.
            assert (decode() - expected).norm() / expected.norm() <= .02
        assert not [p for p in model.parameters() if p.requires_grad]


def test_each_row_has_its_tokens_a_second_its_ratios_and_its_memory(machine):
    with OnTheCPU():
        entries = bench_inference.measure_size("800M", fp4.build())
    assert list(entries) == ["bf16", "fp4", "fp8"]
    entries["fp4"].update(ms=1., ratio=.5, prefill_ms=2., prefill_ratio=.25)
    head, _, *lines = cells(bench_inference.model_table({"800M": entries}))
    assert head == ["size", "row", "prefill, tokens/s", "time / bf16", "decode, tokens/s",
                    "time / bf16", "peak GiB"]
    assert lines == [
        ["800M", "`bf16`", "5,000", "1.00", "500.0", "1.00", "2.00"],
        ["800M", "`fp4`", "10,000", "0.25", "1,000.0", "0.50", "2.00"],
        ["800M", "`fp8`", "5,000", "1.00", "500.0", "1.00", "2.00"]]


def test_a_row_that_does_not_fit_is_left_out(machine, monkeypatch):
    prepared = bench_inference.prepared

    def without_fp8(size, row, backend):
        if row == "fp8":
            raise torch.OutOfMemoryError("no")
        return prepared(size, row, backend)

    monkeypatch.setattr(bench_inference, "prepared", without_fp8)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with OnTheCPU():
        assert list(bench_inference.measure_size("800M", fp4.build())) == ["bf16", "fp4"]


def test_a_product_s_rate_counts_the_bytes_of_the_packed_weight(machine, monkeypatch):
    monkeypatch.setattr(bench_inference, "PRODUCTS", [(96, 64)])
    monkeypatch.setattr(bench, "inputs_beyond_cache", lambda n_bytes: 3)
    monkeypatch.setattr(bench, "random_bf16", lambda rows, columns: torch.randn(
        min(rows, 128), min(columns, 64), dtype=torch.bfloat16))
    rates = bench_inference.measure_products()
    assert rates == {"copy": pytest.approx(2 * 128 * 64 * 2 / 2e9),
                     "96 x 64": pytest.approx((96 * 64 / 2 + 96 * 64 / 32) / 2e9)}
    _, _, *lines = cells(bench_inference.product_table({"copy": 3.0, "96 x 64": 2.25}))
    assert lines == [["copy", "3.00", "100%"], ["96 x 64", "2.25", "75%"]]
