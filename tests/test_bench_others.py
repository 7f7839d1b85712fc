"""Our layers beside torchao's, with a made-up torchao on the CPU; and the table."""
import sys
import types

import pytest
import torch

import fp4
from data.files import UserError
from test_bench import CPU, OnTheCPU, calls, cells
from tools import bench, bench_others, markdown
from tools.bench_others import BLOCK, OURS, SHAPES, TORCHAO

__all__ = ["calls"]                     # a fixture
ROWS = ["bf16", *TORCHAO, *OURS]


class Float8Linear(torch.nn.Linear):
    """What the made-up torchao makes of a layer."""
    broken = ()

    def forward(self, x):
        if self.config in self.broken:
            raise RuntimeError(f"no kernel for {self.config}\nat all")
        return super().forward(x)


@pytest.fixture
def torchao(monkeypatch):
    def convert_to_float8_training(module, *, config):
        for name, child in module.named_children():
            assert type(child) is torch.nn.Linear and child.weight.dtype == torch.bfloat16
            converted = Float8Linear(child.in_features, child.out_features, bias=False)
            converted.weight = child.weight
            converted.config = config
            setattr(module, name, converted)
        return module

    class Float8LinearConfig:
        @staticmethod
        def from_recipe_name(name):
            return {name: f"the config of {name}" for name in (
                "tensorwise", "rowwise", "rowwise_with_gw_hp")}[name]

    package = types.ModuleType("torchao")
    package.__version__ = "0.18.0"
    package.float8 = types.ModuleType("torchao.float8")
    package.float8.Float8LinearConfig = Float8LinearConfig
    package.float8.convert_to_float8_training = convert_to_float8_training
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.float8", package.float8)
    return Float8Linear


@pytest.fixture
def made(monkeypatch):
    """the layers that are compiled"""
    made = []

    def recorded_compile(layer, fullgraph, dynamic):
        assert fullgraph and not dynamic
        made.append(layer)
        return layer

    monkeypatch.setattr(torch, "compile", recorded_compile)
    return made


def test_every_row_has_the_layer_that_it_names_and_all_weights_but_ours_are_bf16(
        torchao, calls, made):
    with OnTheCPU():
        for row in ROWS:
            [measure] = bench_others.layer(64, 96, 32, row, CPU)
    for row, layer in zip(ROWS, made, strict=True):
        assert (layer.in_features, layer.out_features) == (32, 96)
        if row in OURS:
            assert type(layer) is fp4.Linear and layer.recipe == fp4.recipe(row)
            assert layer.weight.dtype == torch.float32
        elif row in TORCHAO:
            assert type(layer) is torchao and layer.weight.dtype == torch.bfloat16
            assert layer.config == f"the config of {TORCHAO[row]}"
        else:
            assert type(layer) is torch.nn.Linear and layer.weight.dtype == torch.bfloat16
    assert list(TORCHAO.values()) == ["tensorwise", "rowwise", "rowwise_with_gw_hp"]


@pytest.mark.parametrize("row", ["bf16", "torchao rowwise", "fp4"])
def test_both_passes_of_a_layer_are_replayed_and_not_called(torchao, calls, made, row):
    with OnTheCPU():
        [measure] = bench_others.layer(64, 64, 32, row, CPU)
        times = measure()
    # 10 ms a replayed backward pass and, of ours, 1 ms a forward pass; twice that if called.
    assert times == {"ms": 11. if row == "fp4" else 10.}


def test_a_recipe_of_torchao_s_that_does_not_run_here_is_named_and_the_others_are_measured(
        torchao, monkeypatch):
    monkeypatch.setattr(torchao, "broken", ("the config of rowwise",))
    with OnTheCPU():
        rows, problems = bench_others.usable_torchao()
    assert rows == ["torchao tensorwise", "torchao rowwise, dw in BF16"]
    assert problems == ["torchao rowwise: RuntimeError: no kernel for the config of rowwise"]


# ---- the table

def entries(rows=ROWS):
    """bf16 takes 1 ms for each 1000 out-features, the second row 0.9 of it, the third 0.8 ..."""
    made = []
    for shape in dict.fromkeys(SHAPES + BLOCK):
        for i, row in enumerate(rows):
            ms = shape[1] / 1000 * (1 - i / 10)
            made.append({"tokens": shape[0], "out": shape[1], "in": shape[2], "row": row, "ms": ms,
                         "ratio": 1 - i / 10 + 0.03 * (i > 0)})
    return made


def test_a_shape_has_bf16_s_time_and_each_row_s_share_of_it_in_the_same_rounds():
    head, _, *lines = cells(bench_others.others_table(entries()))
    assert head == ["tokens, out, in", "bf16, ms", "torchao tensorwise", "torchao rowwise",
                    "torchao rowwise, dw in BF16", "fp8", "fp4"]
    assert len(lines) == len(SHAPES) + len(BLOCK) + 1
    assert lines[0] == ["16384, 4096, 4096", "4.096", "0.93", "0.83", "0.73", "0.63", "0.53"]
    # 12288 + 4096 + 16384 + 4096
    assert lines[-1] == ["the last four together", "36.864", "0.90", "0.80", "0.70", "0.60", "0.50"]


def test_the_sum_is_that_of_long_layers_and_not_a_mean_of_ratios():
    made = entries()
    for entry in made:
        if (entry["row"], entry["out"]) == ("fp4", 16384):
            entry["ms"] = 16.384
    *_, last = cells(bench_others.others_table(made))
    assert last[-1] == f"{(16.384 + 20.480 / 2) / 36.864:.2f}"


def test_what_does_not_fit_into_memory_has_no_ratio_and_no_sum():
    made = entries()
    for entry in made:
        if (entry["row"], entry["out"]) == ("fp8", 12288):
            del entry["ms"], entry["ratio"]
    lines = {line[0]: line for line in cells(bench_others.others_table(made))}
    assert lines["15872, 12288, 4096"][5:] == ["out of memory", "0.53"]
    assert lines["the last four together"][5:] == ["", "0.50"]


@pytest.fixture
def main(monkeypatch, tmp_path):
    """main(*argv) -> the README afterwards, rows that were measured"""
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- others -->\nold\n<!-- /others -->\nb\n")
    measured = []

    def each(prepare, shapes, rows, backend):
        assert (prepare, backend) == (bench_others.layer, CPU) and shapes == SHAPES + BLOCK
        measured.extend(rows)
        return entries(rows)

    monkeypatch.setattr(bench, "README", str(readme))
    monkeypatch.setattr(bench, "load_kernels", lambda gemm: CPU)
    monkeypatch.setattr(bench, "each", each)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")

    def run(*argv):
        with OnTheCPU():
            bench_others.main(argv)
        return readme.read_text(), measured
    return run


def test_with_torchao_all_rows_are_in_the_readme_with_its_version(main, torchao, capsys):
    text, measured = main("--write")
    assert measured == ROWS
    assert text.startswith("a\n<!-- others -->\n`python -m tools.bench_others` on one NVIDIA H100")
    assert "torchao 0.18.0, " in text and "not installed" not in text
    assert text.endswith("|\n<!-- /others -->\nb\n")
    assert bench_others.others_table(entries()) in capsys.readouterr().out
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 100


def test_without_torchao_a_sentence_says_so_and_ours_are_measured(main, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchao", None)
    text, measured = main()
    assert measured == ["bf16", *OURS] and "\nold\n" in text
    printed = capsys.readouterr()
    assert printed.out.endswith("- torchao is not installed: `pip install torchao`\n")
    assert "torchao not installed" in printed.out
    assert printed.err == "bench: torchao is not installed: `pip install torchao`\n"


def test_without_a_gpu_or_markers_a_sentence_says_so(main, monkeypatch, torchao):
    with open(bench.README, "w") as file:
        file.write("no markers")
    with pytest.raises(UserError, match="^README.md is as it was, because it needs one <!-- oth"):
        main("--write")

    def load_kernels(gemm):
        raise ValueError("torch sees no GPU here")

    monkeypatch.setattr(bench, "load_kernels", load_kernels)
    with pytest.raises(UserError, match="^torch sees no GPU here$"):
        main()


def test_the_readme_of_the_method_has_the_markers():
    with open(bench.README) as file:
        assert "new" in markdown.replaced(file.read(), "new", "others")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_torchao_s_recipes_run_where_it_is_installed():
    if bench_others.version() is None or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs torchao and a Hopper")
    rows, problems = bench_others.usable_torchao()
    assert rows == list(TORCHAO) and problems == []
    for row in rows:
        [measure] = bench_others.layer(1024, 512, 256, row, CPU)
        assert 0 < measure()["ms"] < 100
