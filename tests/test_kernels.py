"""The compiled ops give the bytes of fp4/reference.py, on ugly shapes and ugly values."""
import pytest, torch
import fp4
from fp4 import reference

HOW = fp4.build()
ops = torch.ops.fp4
pytestmark = pytest.mark.skipif(HOW.startswith("reference"), reason="no compiler on this machine")

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
SHAPES = [(1, 32), (3, 96), (33, 160), (64, 32), (31, 1024), (100, 544)]
VALUES = {
    "normal":       lambda x: x,
    "rows scaled":  lambda x: x * torch.exp(4 * torch.randn(x.shape[0], 1)),
    "tiny":         lambda x: x * 1e-30,
    "subnormal":    lambda x: x * 1e-42,
    "huge":         lambda x: x * 1e38,
    "3e38":         lambda x: torch.full_like(x, 3e38),
    "zero":         lambda x: x * 0,                            # with negative zeros
    "a zero block": lambda x: torch.cat((x[:, :0], torch.zeros_like(x[:, :32]), x[:, 32:]), 1),
    "constant":     lambda x: torch.full_like(x, 0.3),
    "ties":         lambda x: torch.round(4 * x) / 4,
    "NaN":          lambda x: x.index_put((torch.tensor(0), torch.tensor(5)), torch.tensor(float("nan"))),
    "Inf":          lambda x: x.index_put((torch.tensor(0), torch.tensor(5)), torch.tensor(float("inf"))),
}


def same(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        bits = {2: torch.int16, 4: torch.int32}.get(a.element_size(), torch.uint8)
        if a.is_floating_point():                               # any NaN equals any other, -0 does not equal 0
            assert torch.equal(a.isnan(), b.isnan())
            a, b = a.nan_to_num(0.).view(bits), b.nan_to_num(0.).view(bits)
        differ = (a != b).nonzero()
        assert len(differ) == 0, f"{len(differ)} of {a.numel()} differ, first at {differ[0].tolist()}"


@pytest.fixture(params=[(s, v, d) for s in SHAPES for v in VALUES for d in (torch.float32, torch.bfloat16)],
                ids=lambda p: f"{p[0][0]}x{p[0][1]}-{p[1]}-{str(p[2])[6:]}")
def x(request):
    (M, K), value, dtype = request.param
    torch.manual_seed(M * K)
    return VALUES[value](torch.randn(M, K)).to(dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_each_op_gives_the_bytes_of_the_definition(x, device):
    def check(name, *args):
        got = getattr(ops, name)(*(a.to(device) if isinstance(a, torch.Tensor) else a for a in args))
        want = getattr(reference, name)(*args)
        same([t.cpu() for t in got] if isinstance(got, tuple | list) else [got.cpu()], want if isinstance(want, tuple) else [want])
    for scale in ("floor", "nearest"): check("quantize_forward", x, scale)
    codes, scales, mask = reference.quantize_forward(x, "floor")
    signs, seeds = reference.draw(x, x, 3)
    for how in ((False, False), (False, True), (True, False), (True, True)):                    # stochastic, signs after
        check("quantize_backward", x, signs, seeds[:2], *how)
        check("requantize", codes, scales, signs, seeds[2:], *how)
    for dtype in (torch.float32, torch.bfloat16):
        check("dequantize", codes, scales, dtype)
        check("unrotate", x, mask, dtype)


@pytest.mark.parametrize("M, N, K", [(1, 32, 32), (33, 64, 96), (100, 160, 1024), (3, 64, 4096)])
@pytest.mark.parametrize("dtype, ulp", [(torch.float32, 2 ** -23), (torch.bfloat16, 2 ** -8)])
@pytest.mark.parametrize("device", DEVICES)
def test_a_product_is_within_the_error_of_an_fp32_sum_and_one_rounding(M, N, K, dtype, ulp, device):
    torch.manual_seed(K)
    a, b = (reference.quantize_forward(torch.randn(rows, K), "floor")[:2] for rows in (M, N))
    got = ops.gemm(*(t.to(device) for t in (*a, *b)), 16 / 9, dtype).cpu().double()
    exact = reference.gemm(*a, *b, 16 / 9, torch.float32).double()
    size = 16 / 9 * reference.dequantize(*a, torch.float64).abs() @ reference.dequantize(*b, torch.float64).abs().T
    assert (got - exact).abs().le(K * 2 ** -24 * size + ulp * exact.abs()).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_folding_into_fp8_changes_no_value_within_15_octaves():
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (50, 512), dtype=torch.uint8)
    scales = torch.randint(0, 225, (50, 1)) + torch.randint(0, 15, (50, 32))
    scales[:, 3], codes[:, 48:64] = 254, 0                      # a zero block's scale does not count
    codes[:, 64], scales[:, 4] = 7, scales.amin(1)              # nor is it lost at the lower end
    codes, scales = codes.cuda(), scales.to(torch.uint8).cuda()
    fp8, rows = ops.fold(codes, scales, 1.0)
    assert torch.equal(fp8.double() * rows.double(), ops.dequantize(codes, scales, torch.float32).double())


def test_an_op_takes_no_matrix_it_would_misread():
    x = torch.randn(64, 64)
    with pytest.raises(RuntimeError, match="contiguous"): ops.quantize_forward(x.T, "floor")
    with pytest.raises(RuntimeError, match="seeds must have 2"): ops.quantize_backward(x, torch.zeros(1).long(), torch.zeros(3).long(), False, False)
    with pytest.raises(RuntimeError, match="mask"): ops.unrotate(x, torch.zeros(64, 3, dtype=torch.int32), torch.float32)
