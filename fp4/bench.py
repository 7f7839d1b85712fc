"""
How fast the kernels and whole linear layers are on the GPU at hand: kernels against a copy of the same bytes, linears
(forward + backward, quantisation included) against compiled BF16 in the same run.

    make bench          # or python -m fp4.bench

Times are medians; inputs rotate, so that they come from memory and not from the cache.
"""
import datetime, itertools, statistics, sys
import torch
import fp4

ops = torch.ops.fp4
SHAPES = [(16384, 4096, 4096), (16384, 11008, 4096), (16384, 4096, 11008), (32768, 2048, 2048), (32768, 640, 640)]


def milliseconds(f, n=30):
    """median time of f on the GPU"""
    for _ in range(3): f()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
    for start, stop in events:
        start.record(), f(), stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def kernels(M=16384, K=4096):
    """each kernel's bytes a second, read and written, as a share of a copy's"""
    inputs = [torch.randn(M, K, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    packed = [ops.quantize_forward(x, "floor") for x in inputs]
    weight = ops.quantize_forward(torch.randn(K, K, device="cuda"), "floor")
    x, p = (lambda it=itertools.cycle(inputs): next(it)), (lambda it=itertools.cycle(packed): next(it))
    signs, seeds = ops.draw(inputs[0], inputs[0], 2)
    four, mask = .5 + 1 / 32, 1 / 8                             # bytes a value
    to = torch.empty_like(inputs[0])
    copy = 4 * M * K / milliseconds(lambda: to.copy_(x()))
    print(f"\nkernels at {M} x {K}; a copy moves {copy / 1e9:.2f} TB/s\n{'':34s}      ms   of a copy")
    for name, count, f in (
        ("quantise forward",                   2 + four + mask, lambda: ops.quantize_forward(x(), "floor")),
        ("quantise backward, dy and dy.T",     2 + 2 * four,    lambda: ops.quantize_backward(x(), signs, seeds, False, False)),
        ("the same, stochastic rounding",      2 + 2 * four,    lambda: ops.quantize_backward(x(), signs, seeds, True, False)),
        ("quantise backward, packed x.T",      2 * four,        lambda: ops.requantize(*p()[:2], signs, seeds[:1], False, False)),
        ("the same, stochastic rounding",      2 * four,        lambda: ops.requantize(*p()[:2], signs, seeds[:1], True, False)),
        ("mask and un-rotate",                 4 + mask,        lambda: ops.unrotate(x(), packed[0][2], torch.bfloat16)),
        ("fold into FP8",                      1 + four,        lambda: ops.fold(*p()[:2], 1.0))):
        ms = milliseconds(f)
        print(f"{name:34s} {ms:7.3f}   {count * M * K / ms / copy:8.0%}")
    ms = milliseconds(lambda: ops.gemm(*p()[:2], *weight[:2], 1.0, torch.bfloat16))
    print(f"{'product with [K, K], folds included':35s}{ms:7.3f}   {2 * M * K * K / ms / 1e9:8.0f} TFLOP/s")


def linears(rows=("bf16", "fp4", "fp4-sr")):
    print(f"\nlinear, forward + backward, ms\n{'tokens, out, in':22s}" + "".join(f"{row:>9s}" for row in rows) + "".join(f"{row:>14s}" for row in rows[1:]))
    for M, N, K in SHAPES:
        times = []
        for row in rows:
            layer = fp4.Linear(K, N, row).cuda()
            if layer.recipe.forward: layer.quantize_weight()    # as in training: once a step, not counted in a microbatch
            run = torch.compile(layer)
            inputs = itertools.cycle([torch.randn(M, K, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2)])
            dy = torch.randn(M, N, device="cuda", dtype=torch.bfloat16)
            def step():
                x = next(inputs)
                x.grad = layer.weight.grad = None
                run(x).backward(dy)
            times.append(milliseconds(step))
        print(f"{f'{M}, {N}, {K}':22s}" + "".join(f"{t:9.3f}" for t in times) + "".join(f"{t / times[0]:9.2f} x" + " " * 3 for t in times[1:]))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("bench: torch sees no GPU here", file=sys.stderr)
        sys.exit(2)
    fp4.build()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {datetime.date.today()}")
    kernels()
    linears()
