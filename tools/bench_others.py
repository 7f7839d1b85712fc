"""
Our linear layers beside torchao's, an FP8 library for PyTorch: its three recipes for training.

    python -m tools.bench --only others     # prints only, as python -m tools.bench_others does
    python -m tools.bench_others --write    # rewrites the table of fp4/README.md

A layer's forward and backward pass, compiled, replayed from a CUDA graph in one process; the rows
of a shape take turns, as in bench.py. Everything is relative to nn.Linear in BF16 with a BF16
weight. torchao's weights are BF16 as well, and quantised in each pass. Ours are float32, as the
optimizer needs them: fp8 quantises its in each pass, and fp4 once a step, which does not count.

Besides the bench's shapes there are the four layers of a block that Transformer Engine publishes
times of. Without torchao (pip install torchao) our own rows are measured.

torchao changes how torch.compile writes a maximum, in the whole process. So it is loaded before
anything is compiled, and that holds for all rows alike.
"""
import datetime
import sys

from tools import cli


def parse(argv):
    parser = cli.Parser("python -m tools.bench_others", __doc__)
    parser.add_argument("--write", action="store_true", help="rewrite the table of the README")
    return parser.parse_args(argv)


# The imports below take seconds, so that --help and mistyped flags are answered here.
if __name__ == "__main__":
    cli.start(parse, "bench_others", "tools.bench_others")

import torch

from data.files import checked
from tools import bench, machine
from tools.bench_report import ROUNDS, SHAPES, by_row, numbers, ratio, ratio_to_bf16, show
from tools.markdown import bullets, rewrite, table

# Our name of a row -> torchao's name of the recipe.
TORCHAO = {
    "torchao tensorwise": "tensorwise",
    "torchao rowwise": "rowwise",
    "torchao rowwise, dw in BF16": "rowwise_with_gw_hp",
}
OURS = ["fp8", "fp4"]
# tokens, out-features, in-features: qkv, the projection after attention, and both of the MLP
BLOCK = [(15872, 12288, 4096), (15872, 4096, 4096), (15872, 16384, 4096), (15872, 4096, 16384)]


# ---- layers

def plain_layer(N, K):
    return torch.nn.Linear(K, N, bias=False, device="cuda", dtype=torch.bfloat16)


def torchao_layer(N, K, name):
    """A layer that torchao has converted to one of its recipes."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    parent = torch.nn.Sequential(plain_layer(N, K))
    config = Float8LinearConfig.from_recipe_name(name)
    return convert_to_float8_training(parent, config=config)[0]


def usable_torchao():
    """(the rows of torchao that run here, a sentence on each that does not)."""
    if version() is None:
        return [], ["torchao is not installed: `pip install torchao`"]
    rows = []
    problems = []
    for row, name in TORCHAO.items():
        try:
            x = bench.random_bf16(256, 256).requires_grad_()
            torchao_layer(256, 256, name)(x).backward(bench.random_bf16(256, 256))
            rows.append(row)
        except Exception as error:      # Of any kind: another version, or another GPU.
            problems.append(f"{row}: {type(error).__name__}: {machine.first_line(error)}")
    return rows, problems


def version():
    """torchao's version, such as 0.18.0; None where it is not installed."""
    try:
        import torchao
        return torchao.__version__
    except ImportError:
        return None


def layer(M, N, K, row, backend):
    """The burst of both passes of a layer, replayed."""
    if row in OURS:
        _, both_passes, pairs = bench.layer_and_inputs(M, N, K, row, backend)
    else:
        made = torchao_layer(N, K, TORCHAO[row]) if row in TORCHAO else plain_layer(N, K)
        _, both_passes, pairs = bench.with_inputs(made, M, N, K)

    def passes_of_all():
        for pair in pairs:
            both_passes(*pair)

    passes_of_all()                     # compiles, before anything is captured
    return [bench.burst(bench.captured(passes_of_all), len(pairs))]


# ---- the table

ABOUT = f"""\
Forward and backward pass of one linear layer, the GPU's time, replayed from a CUDA graph, as a
share of nn.Linear's in BF16 with a BF16 weight in the same round ({ROUNDS} rounds in turns).
torchao quantises activations, gradients and its BF16 weight in each pass, and so does our fp8 with
its float32 weight; fp4 quantises its weight once a step, which does not count. The last line is all
four layers of the block that Transformer Engine times: the sum of their medians."""


def report(results):
    """What is between the markers of the README."""
    title = f"`python -m tools.bench_others` on one {results['gpu']} (torch {results['torch']}, " \
            f"torchao {results['torchao']}, {results['date']})"
    parts = [title, ABOUT, others_table(results["entries"])]
    return "\n\n".join(parts + ([bullets(results["problems"])] if results["problems"] else []))


def others_table(entries):
    shapes = by_row(entries)
    rows = list(next(iter(shapes.values())))
    lines = []
    for shape, of_row in shapes.items():
        ratios = [ratio_to_bf16(of_row[row], of_row["bf16"]) or "out of memory" for row in rows[1:]]
        lines.append([numbers(shape), show(of_row["bf16"].get("ms"), ".3f"), *ratios])
    sums = {row: sum_of_block(shapes, row) for row in rows}
    ratios = [ratio(sums[row], sums["bf16"]) for row in rows[1:]]
    lines.append(["the last four together", show(sums["bf16"], ".3f"), *ratios])
    return table(["tokens, out, in", "bf16, ms", *rows[1:]], lines)


def sum_of_block(shapes, row):
    """The ms of all layers of the block; None if one of them did not fit into memory."""
    times = [shapes[shape][row].get("ms") for shape in BLOCK]
    return None if None in times else sum(times)


# ---- main

def main(argv):
    args = parse(argv)
    backend = checked(bench.load_kernels, "auto")
    rows, problems = usable_torchao()
    for problem in problems:
        bench.log("bench:", problem)
    entries = bench.each(layer, SHAPES + BLOCK, ["bf16", *rows, *OURS], backend)
    text = report(dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__,
                       torchao=version() or "not installed", date=str(datetime.date.today()),
                       entries=entries, problems=problems))
    print(text)
    if args.write:
        rewrite(bench.README, text, "others")


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:], "bench_others", go_on=""))
