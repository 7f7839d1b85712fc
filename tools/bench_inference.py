"""
Inference on this GPU: reading a prompt (prefill), writing one token after the other (decode), the
memory that takes, and the product of a few rows alone.

    python -m tools.bench --only inference  # prints, as python -m tools.bench_inference does

One text, whose prompt has 512 tokens. Its weights are held as --sample holds them, and a step is
that of generate.py, replayed as a CUDA graph: what is left is the GPU's time. The rows of a size
are in memory together and take turns, as in bench.py. Peak memory is that of a row alone, with its
weights, its cache and what a step needs.
"""
import datetime
import functools
import sys

from tools import cli


def parse(argv):
    return cli.Parser("python -m tools.bench_inference", __doc__).parse_args(argv)


# The imports below take seconds, so that --help and mistyped flags are answered here.
if __name__ == "__main__":
    cli.start(parse, "bench_inference", "tools.bench_inference")

import torch

from data.files import checked
from fp4 import ops
from model import PRESETS, Llama
from tools import bench, generate
from tools.bench_report import VOCABULARY, ratio_to_bf16
from tools.markdown import table

SIZES = ("800M", "3200M", "7B")
ROWS = ("bf16", "fp4", "fp8")           # fp8 comes last: its weights stay float32, the largest.
PROMPT = 512                            # tokens
LENGTH = 1024                           # columns of the cache
GIB = 2 ** 30
BYTES_PER_WEIGHT = 17 / 32              # of a packed matrix: a code, and a scale for 32
# out-features and in-features of the layers of a block: 800M's, and 7B's
PRODUCTS = [(6144, 2048), (2048, 2048), (11264, 2048), (2048, 5632),
            (12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]


# ---- a model

def packed_model(size, row, backend):
    with torch.device("cuda"):
        config = PRESETS[size].model_config(VOCABULARY, LENGTH)
        model = Llama(config, bench.recipe_of(row), torch.bfloat16, backend=backend)
    generate.hold_for_inference(model.requires_grad_(False))
    return model


def steps_of(model):
    """Prefill and decode as functions that a CUDA graph can record."""
    decoder = generate.Decoder(model, LENGTH)
    prompt = torch.randint(VOCABULARY, (1, PROMPT), device="cuda")
    decoder.begin(prompt.tolist())
    columns = decoder.columns
    prefill = functools.partial(decoder.step, prompt, columns[:PROMPT])
    decode = functools.partial(decoder.step, prompt[:, :1], columns[PROMPT:PROMPT + 1])
    return prefill, decode


@torch.no_grad()
def prepared(size, row, backend):
    """The bursts of a row, and its peak memory in GiB."""
    before = torch.cuda.memory_allocated()
    model = packed_model(size, row, backend)
    torch.cuda.reset_peak_memory_stats()
    prefill, decode = [bench.captured(step) for step in steps_of(model)]
    peak = torch.cuda.max_memory_allocated() - before
    bursts = [bench.burst(prefill, name="prefill_"), bench.burst(decode, repeats=20)]
    return bursts, peak / GIB


def measure_size(size, backend):
    """{row: its times, ratios and peak memory}, of the rows that fit into memory together."""
    found = {row: bench.if_it_fits(prepared, size, row, backend) for row in ROWS}
    fitting = {row: made for row, made in found.items() if made is not None}
    entries = bench.medians(bench.rounds({row: bursts for row, (bursts, _) in fitting.items()}))
    for row in entries:
        entries[row]["peak_gib"] = fitting[row][1]
    return entries


# ---- the product of one row

def measure_products():
    """The terabytes a second that a copy reads and writes, and that each product of one row reads.
    """
    source = bench.random_bf16(16384, 4096)
    target = torch.empty_like(source)
    bursts = {"copy": [bench.burst(lambda: target.copy_(source), repeats=10)]}
    n_bytes = {"copy": 2 * source.numel() * source.element_size()}
    for N, K in PRODUCTS:
        name = f"{N} x {K}"
        n_bytes[name] = N * K * BYTES_PER_WEIGHT
        bursts[name] = [product_burst(N, K, bench.inputs_beyond_cache(n_bytes[name]))]
    times = bench.medians(bench.rounds(bursts), base="copy")
    return {name: n_bytes[name] / times[name]["ms"] / 1e9 for name in times}


def product_burst(N, K, n_weights):
    """The burst of one row times each of some weights, which come from memory."""
    x, _ = ops.quantize_forward(bench.random_bf16(1, K), "floor")
    weights = [ops.quantize_forward(bench.random_bf16(N, K), "floor")[0] for _ in range(n_weights)]

    def multiply_all():
        for weight in weights:
            ops.matvec(x, weight, torch.bfloat16)

    return bench.burst(bench.captured(multiply_all), n_weights)


# ---- the tables

def model_table(results):
    lines = []
    for size, entries in results.items():
        for row, entry in entries.items():
            base = entries.get("bf16", {})
            lines.append([
                size, f"`{row}`",
                f"{1000 * PROMPT / entry['prefill_ms']:,.0f}",
                ratio_to_bf16(entry, base, "prefill_"),
                f"{1000 / entry['ms']:,.1f}",
                ratio_to_bf16(entry, base),
                f"{entry['peak_gib']:.2f}",
            ])
    head = ["size", "row", "prefill, tokens/s", "time / bf16", "decode, tokens/s", "time / bf16",
            "peak GiB"]
    return table(head, lines)


def product_table(rates):
    lines = [[name, f"{rate:.2f}", f"{rate / rates['copy']:.0%}"] for name, rate in rates.items()]
    return table(["product of one row: N x K", "TB/s", "of a copy"], lines)


# ---- main

def main(argv):
    parse(argv)
    backend = checked(bench.load_kernels, "auto")
    results = {}
    for size in SIZES:
        results[size] = measure_size(size, backend)
        bench.clear_gpu()
    print(f"`python -m tools.bench_inference` on one {torch.cuda.get_device_name()} "
          f"(torch {torch.__version__}, {datetime.date.today()})")
    print(f"\n{model_table(results)}\n\n{product_table(measure_products())}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:], "bench_inference", go_on=""))
