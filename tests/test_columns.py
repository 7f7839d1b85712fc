"""The quantisers of the recipes that columns describe: their definition, and the kernels, which are
compiled for one GemmSpec each."""
import pytest
import torch

from fp4 import reference
from fp4.build import columns_name
from fp4.emulate import columns, quantizers
from fp4.recipes import SCALE_RULES, GemmSpec, validate
from operands import at_the_edge_of_a_scale, same, ugly_values

WORDS = torch.tensor([0x5DA94F3671C8E2B5, -0x123456789ABCDEF1, 77, 2 ** 63 - 3])
SIGNS = WORDS[:2]
SEED = WORDS[3:]


def define(x, spec, transposed=False, dtype=torch.float32, factor=None, square=False):
    "-> values, factor, mask"
    return columns.quantize_by_definition(
        x, factor, SIGNS, SEED, transposed, dtype, spec, square)


# ---- the definition

@pytest.mark.parametrize("rule", ["floor", "nearest"])
def test_quests_values_and_masks_are_those_of_the_reference_bit_for_bit(rule):
    for x in (ugly_values(40, 96), at_the_edge_of_a_scale()):
        codes, scales, mask = reference.quantize_forward(x, rule)
        values, factor, got_mask = define(x, GemmSpec("mxfp4", rule, 32, "none"))
        same([values + 0.], [reference.dequantize(codes, scales, torch.float32) + 0.])
        assert torch.equal(got_mask, mask) and factor.tolist() == [[1]]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("order", ["before", "after", "none"])
def test_absmax34s_values_are_those_of_the_reference_bit_for_bit(rounding, order):
    "both ways; after and before the rotation; NaN where it has NaN"
    spec = GemmSpec("mxfp4", "absmax34", 0 if order == "none" else 32, order, rounding)
    x = ugly_values(40, 96)
    packed = reference.quantize_backward(
        x, SIGNS[:1], SEED.repeat(2), rounding == "stochastic", order, order)
    for transposed in (False, True):
        codes, scales = packed[2 * transposed:][:2]
        values, factor, mask = define(x, spec, transposed)
        same([values + 0.], [reference.dequantize(codes, scales, torch.float32) + 0.])
        assert factor == torch.tensor(4 / 3) and mask.numel() == 0


@pytest.mark.parametrize("n", [16, 32, 64, 128])
def test_a_rotation_multiplies_by_the_hadamard_matrix_and_undoes_itself(n):
    torch.manual_seed(0)
    v = torch.randn(3, 2 * n)
    H = torch.ones(1, 1).double()
    while len(H) < n:
        H = torch.kron(torch.tensor([[1., 1], [1, -1]]).double(), H)
    sign = [1 - 2 * (int(word) >> i & 1) for word in SIGNS for i in range(64)][:n]
    expected = (v.double().view(-1, n) * torch.tensor(sign) @ H * n ** -.5).view(3, -1)
    rotated = columns.rotate(v, n, SIGNS)
    assert (rotated - expected).abs().max() <= 1e-6
    assert (columns.rotate(rotated, n, SIGNS, signs_after=True) - v).abs().max() <= 1e-6
    if n == 32:
        same([columns.rotate(v, n)], [reference.hadamard(reference.blocks(v)).flatten(-2)])


def test_a_sum_adds_neighbours_first_and_skips_what_is_missing():
    big = 2. ** 24
    for terms, expected in (([big, 1, 1, 1], big + 2), ([1, 1, big, 1], big + 2),
                            ([1, 1, 1, big, 1], big + 4), ([1.], 1)):
        assert quantizers.total(torch.tensor(terms)).tolist() == [expected]
    v = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    same([quantizers.total(v)], [reference.total(v)])


# ---- kernels

ROUNDINGS = ("nearest", "stochastic", "eden")
ROTATIONS = ((0, "none"), (16, "before"), (32, "after"), (64, "before"), (128, "before"),
             (32, "none"), (128, "after"))


def every_quantiser():
    """Each scale rule of each format with each rounding that it may have, and square blocks; the
    rotations take turns."""
    specs = []
    for format, rules in SCALE_RULES.items():
        for rule in rules:
            for rounding in ROUNDINGS:
                rotation = ROTATIONS[len(specs) % len(ROTATIONS)]
                spec = GemmSpec(format, rule, *rotation, rounding)
                if is_allowed(spec):
                    specs.append((spec, False))
    for rule in SCALE_RULES["nvfp4"]:
        for n in (0, 16, 32):
            specs.append((GemmSpec("nvfp4", rule, n, "none" if n == 0 else "before"), True))
    return specs


def is_allowed(spec):
    "whatever the signs, which here are before a rotation more often than a recipe has them"
    try:
        validate("dgrad", spec._replace(rotation=32, signs="before"))
        return True
    except ValueError:
        return False


QUANTISERS = every_quantiser()
NAMES = [columns_name(*quantiser) for quantiser in QUANTISERS]
each_quantiser = pytest.mark.parametrize("spec, square", QUANTISERS, ids=NAMES)


@pytest.fixture
def load(monkeypatch):
    "load(spec, square): its ops; where none was compiled, the test is skipped"
    def load(spec, square=False):
        name = columns_name(spec, square)
        if not columns.ops.get(name):
            columns.ops[name] = columns.load_or_fall_back(spec, square)
        if columns.ops[name] is None:
            pytest.skip("no compiler")
        return columns.ops[name]
    return load


def values_of_all_sizes(rows, k, finite=True):
    """Blocks of 16 of many sizes, with ties, zeros, subnormal and huge numbers; some NaN and Inf
    if not finite."""
    g = torch.Generator().manual_seed(rows)
    sizes = torch.randint(-12, 12, (rows, k // 16), generator=g).float().exp2()
    x = torch.randn(rows, k, generator=g) * sizes.repeat_interleave(16, 1)
    x[0] = torch.arange(k) % 29 / 4
    x[1, :48] = 0
    x[2] = -0.
    x[3, 16:48] *= 2. ** -140
    x[4] *= 2. ** -100
    if not finite:
        x[5, :16] = 3e38
        x[rows // 2, 3] = torch.nan
        x[rows - 1, k - 1] = torch.inf
    return x


def cases():
    "x, factor, transposed, dtype of the values"
    for rows, k in ((37, 208), (136, 48)):
        for finite in (True, False):
            x = values_of_all_sizes(rows, k, finite)
            by_row = torch.rand(rows, 1, generator=torch.Generator().manual_seed(0)) + .5
            for transposed in (False, True):
                yield x, None, transposed, torch.float32
                yield x, by_row, transposed, torch.bfloat16
                yield x.bfloat16(), by_row[:1], transposed, torch.bfloat16
                yield x.bfloat16(), None, transposed, torch.float32


def moved(device, *tensors): return [t if t is None else t.to(device) for t in tensors]


def check_quantize(ops, spec, square, device="cpu"):
    for x, factor, transposed, dtype in cases():
        want = define(x, spec, transposed, dtype, factor, square)
        got = ops.quantize(*moved(device, x, factor, SIGNS, SEED), transposed, dtype)
        same(moved("cpu", *got), want)


def check_unrotate(ops, spec, device="cpu"):
    g = torch.Generator().manual_seed(0)
    M, K = 70, 384
    mask = torch.randint(-2 ** 31, 2 ** 31 - 1, (M, K // 32), generator=g).int()
    for dtype, out, by_row in ((torch.float32, torch.float32, False),
                               (torch.bfloat16, torch.float32, True),
                               (torch.bfloat16, torch.bfloat16, False)):
        product = torch.randn(M, K, generator=g).to(dtype)
        product[3, 40] = torch.nan
        left = torch.rand(M if by_row else 1, 1, generator=g)
        right = torch.rand(K if by_row else 1, 1, generator=g)
        arguments = (product, left, right, mask, SIGNS)
        want = columns.unrotate_by_definition(*arguments, out, spec)
        got = ops.unrotate(*moved(device, *arguments), out)
        same(moved("cpu", got), [want])


@each_quantiser
def test_the_kernels_of_the_cpu_have_the_bytes_of_the_definition(load, spec, square):
    check_quantize(load(spec, square), spec, square)
    check_unrotate(load(spec, square), spec)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_quantiser
def test_the_kernels_of_the_gpu_have_the_bytes_of_the_definition(load, spec, square):
    check_quantize(load(spec, square), spec, square, "cuda")
    check_unrotate(load(spec, square), spec, "cuda")
