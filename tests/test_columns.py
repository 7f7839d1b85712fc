"""The quantisers of the recipes that columns describe: their definition, and the kernels, which are
compiled for one GemmSpec each."""
import re

import pytest
import torch

import fp4
from fp4 import ops, reference
from fp4.axes import validate
from fp4.build import columns_name, load_columns
from fp4.emulate import columns, matmul, quantizers
from fp4.ops import Packed
from fp4.recipes import RECIPES, SCALE_RULES, GemmSpec
from operands import (
    DEVICES, at_every_size, at_the_edge_of_a_scale, every_scale_byte, random_at_sizes, same,
    ugly_values)
from test_baselines import layer_passes, make_data, run_passes

WORDS = torch.tensor([0x5DA94F3671C8E2B5, -0x123456789ABCDEF1, 77, 2 ** 63 - 3])
SIGNS = WORDS[:2]
SEED = WORDS[3:]


def define(x, spec, transposed=False, dtype=torch.float32, factor=None, square=False, scales=None):
    "-> values, scales, factor, mask"
    return columns.quantize_by_definition(
        x, scales, factor, SIGNS, SEED, transposed, dtype, spec, square)


def same_packed(x, got, want):
    "The same codes and scales, but in blocks of x that are zero, where only the values count."
    same(*([reference.dequantize(*packed, torch.float32) + 0.] for packed in (got, want)))
    counts = (x.unflatten(-1, (-1, 32)) != 0).any(-1)
    for a, b in zip(got, want):
        assert torch.equal(a.unflatten(-1, (*counts.shape[1:], -1))[counts],
                           b.unflatten(-1, (*counts.shape[1:], -1))[counts])


# ---- the definition

@pytest.mark.parametrize("rule", ["floor", "nearest"])
def test_quests_values_and_masks_are_those_of_the_reference_bit_for_bit(rule):
    spec = GemmSpec("mxfp4", rule, 32, "none")
    for x in (ugly_values(40, 96), at_the_edge_of_a_scale(), at_every_size()):
        codes, scales, mask = reference.quantize_forward(x, rule)
        values, _, factor, got_mask = define(x, spec)
        same([values + 0.], [reference.dequantize(codes, scales, torch.float32) + 0.])
        assert torch.equal(got_mask, mask) and factor.tolist() == [[1]]
        same_packed(x, define(x, spec, dtype=torch.uint8)[:2], (codes, scales))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("order", ["before", "after", "none"])
def test_absmax34s_values_are_those_of_the_reference_bit_for_bit(rounding, order):
    "both ways; after and before the rotation; NaN where it has NaN"
    spec = GemmSpec("mxfp4", "absmax34", 0 if order == "none" else 32, order, rounding)
    for x in (ugly_values(40, 96), at_every_size()):
        packed = reference.quantize_backward(
            x, SIGNS[:1], SEED.repeat(2), rounding == "stochastic", order, order)
        for transposed in (False, True):
            want = packed[2 * transposed:][:2]
            values, _, factor, mask = define(x, spec, transposed)
            same([values + 0.], [reference.dequantize(*want, torch.float32) + 0.])
            assert factor == torch.tensor(4 / 3) and mask.numel() == 0
            operand = reference.transpose_padded(x) if transposed else x
            same_packed(operand, define(x, spec, transposed, torch.uint8)[:2], want)


def test_the_scale_of_a_block_is_one_that_e8m0_has():
    "the smallest is 2**-127, which is byte 0; of NaN and infinity it is NaN, byte 255"
    spec = GemmSpec("mxfp4", "absmax", 0, "none")
    sizes = [2. ** e for e in (0, 127, -124, -125, -126, -130, -149)]
    largest = torch.tensor([*sizes, 0, torch.nan, torch.inf])
    x = torch.zeros(len(largest), 32)
    x[:, 5] = -largest
    codes, scales, _, _ = define(x, spec, dtype=torch.uint8)
    assert scales.flatten().tolist() == [125, 252, 1, 0, 0, 0, 0, 127, 255, 255]
    assert (codes[:, 2] >> 4).tolist() == [14, 14, 14, 14, 12, 8, 8, 8, 0, 0]
    for rule in ("mse", "absmax34", "pma"):
        scales = define(x, spec._replace(scale=rule), dtype=torch.uint8)[1].flatten().tolist()
        assert scales[3:7] == [0, 0, 0, 0] and scales[7:] == [127, 255, 255]


@pytest.mark.parametrize("rule", ["floor", "nearest"])
def test_a_multiplier_of_a_power_of_two_moves_every_scale_by_it_and_others_some(rule):
    x = torch.randn(64, 320, generator=torch.Generator().manual_seed(0))

    def scales(multiplier):
        spec = GemmSpec("mxfp4", rule, 32, "none", multiplier=multiplier)
        return define(x, spec, dtype=torch.uint8)[1].int()

    for multiplier, change in ((1., 0), (2., 1), (.25, -2)):
        assert torch.equal(scales(multiplier), scales(1.) + change)
    for multiplier, change in ((.84, -1), (1.2, 1)):
        moved = scales(multiplier) - scales(1.)
        assert set(moved.unique().tolist()) == {0, change}
        # The deviations of the blocks of a matrix spread over a part of an octave.
        assert .02 < (moved != 0).float().mean() < .98


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("rule", SCALE_RULES["mxfp4"])
def test_a_packed_operand_has_the_values_of_one_that_is_not_packed(rule, square):
    "squares of 32 x 32, too, whose scale every row has"
    for rounding in ("nearest", "eden"):
        spec = GemmSpec("mxfp4", rule, 64, "before", rounding)
        for x in (ugly_values(40, 192), at_every_size()):
            values, _, *others = define(x, spec, square=square)
            codes, scales, *others_of_packed = define(x, spec, dtype=torch.uint8, square=square)
            unpacked = reference.dequantize(codes, scales, torch.float32)
            same([unpacked, *others_of_packed], [values, *others])


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


def quantisers_of_the_table():
    found = []
    for row in RECIPES.values():
        if not row.method and not row.has_kernels:
            found += columns.quantizers_of(row)
    return found


def other_quantisers():
    """Each scale rule of each format with each rounding that it may have, and square blocks; the
    rotations take turns."""
    found = []
    for format, rules in SCALE_RULES.items():
        for rule in rules:
            for rounding in ROUNDINGS:
                rotation = ROTATIONS[len(found) % len(ROTATIONS)]
                spec = GemmSpec(format, rule, *rotation, rounding)
                if is_allowed(spec):
                    found.append((spec, False))
    for rule in SCALE_RULES["nvfp4"]:
        for n in (16, 32):
            found.append((GemmSpec("nvfp4", rule, n, "before"), True))
    return found


def is_allowed(spec):
    "whatever the signs, which here are before a rotation more often than a recipe has them"
    try:
        validate("dgrad", spec._replace(rotation=32, signs="before"))
        return True
    except ValueError:
        return False


# QuEST's rules with a multiplier, which no row of the table has.
MULTIPLIED = [(GemmSpec("mxfp4", "floor", 32, "none", multiplier=.84), False),
              (GemmSpec("mxfp4", "nearest", 64, "before", "eden", multiplier=1.2), False)]


def named(quantisers):
    return {columns_name(*quantiser): quantiser for quantiser in quantisers}


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TABLE = named([*quantisers_of_the_table(), *MULTIPLIED])
OTHERS = {name: quantiser for name, quantiser in named(other_quantisers()).items()
          if name not in TABLE}
# To compile and simulate all takes two cores two minutes. So without a GPU every other one of those
# that no row of the table has is tested.
TESTED = list(OTHERS) if torch.cuda.is_available() else list(OTHERS)[::2]
each_quantiser = pytest.mark.parametrize("spec, square", [
    *(pytest.param(*quantiser, id=name) for name, quantiser in TABLE.items()),
    *(pytest.param(*OTHERS[name], id=name, marks=pytest.mark.slow) for name in TESTED)])


def load(spec, square=False):
    "-> its ops, compiled"
    name = columns_name(spec, square)
    if not columns.ops.get(name):
        load_columns(spec, square)
        columns.ops[name] = columns.define_ops(name, spec)
    return columns.ops[name]


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


SMALL = ((37, 208), (136, 48), (9, 1056))     # EDEN adds up the sums of 33 blocks in two rounds.
LARGE = ((1100, 720), (20000, 16))


def cases(shapes):
    "x, scales, factor, transposed, dtype of the values"
    for rows, k in shapes:
        generator = torch.Generator().manual_seed(0)
        by_row = torch.rand(rows, 1, generator=generator) + .5
        for finite in (True, False):
            x = values_of_all_sizes(rows, k, finite)
            for transposed in (False, True):
                yield x, None, None, transposed, torch.float32
                yield x, None, by_row, transposed, torch.bfloat16
                yield x.bfloat16(), None, by_row[:1], transposed, torch.bfloat16
                yield x.bfloat16(), None, None, transposed, torch.float32
        # Of so small a tensor, the inverse of an NVFP4 scale would be infinite.
        yield values_of_all_sizes(rows, k) * 2. ** -130, None, None, False, torch.float32
        codes, scales = random_at_sizes(rows, 32 * (k // 32 + 1), 12, generator)
        yield codes, scales, None, True, torch.bfloat16
        yield codes, scales, by_row, True, torch.float32
        with_nan = scales.clone()
        with_nan[rows // 2, 0] = 255
        with_nan[:, 1:2] = 0
        yield codes, with_nan, by_row[:1], True, torch.float32


def packed_cases(shapes):
    "the same, packed, and every byte of a scale"
    for *case, _ in cases(shapes):
        yield *case, torch.uint8
    yield *every_scale_byte(), None, True, torch.uint8


def moved(device, *tensors):
    return [t if t is None else t.to(device) for t in tensors]


def check_quantize(ops, spec, square, device="cpu", shapes=SMALL):
    for x, scales, factor, transposed, dtype in cases_of(spec, square, shapes):
        want = define(x, spec, transposed, dtype, factor, square, scales)
        got = ops.quantize(*moved(device, x, scales, factor, SIGNS, SEED), transposed, dtype)
        same(moved("cpu", *got), want)


def cases_of(spec, square, shapes):
    for case in (*cases(shapes), *(packed_cases(shapes) if spec.is_packed else ())):
        _, scales, *_ = case
        if scales is None or not square:            # no weight in squares is packed before
            yield case


def check_unrotate(ops, spec, device="cpu"):
    g = torch.Generator().manual_seed(0)
    M, K = 70, 384
    mask = torch.randint(-2 ** 31, 2 ** 31 - 1, (M, K // 32), generator=g).int()
    mask[3, 1] = 0
    for dtype, out, by_row in ((torch.float32, torch.float32, False),
                               (torch.bfloat16, torch.float32, True),
                               (torch.bfloat16, torch.bfloat16, False)):
        product = torch.randn(M, K, generator=g).to(dtype)
        product[3, 40] = torch.nan                          # which NaN * 0 stays
        left = torch.rand(M if by_row else 1, 1, generator=g)
        right = torch.rand(K if by_row else 1, 1, generator=g)
        arguments = (product, left, right, mask, SIGNS)
        want = columns.unrotate_by_definition(*arguments, out, spec)
        got = ops.unrotate(*moved(device, *arguments), out)
        same(moved("cpu", got), [want])


@each_quantiser
def test_the_kernels_of_the_cpu_have_the_bytes_of_the_definition(spec, square):
    check_quantize(load(spec, square), spec, square)
    check_unrotate(load(spec, square), spec)


@needs_gpu
@each_quantiser
def test_the_kernels_of_the_gpu_have_the_bytes_of_the_definition(spec, square):
    check_quantize(load(spec, square), spec, square, "cuda", SMALL + LARGE)
    check_unrotate(load(spec, square), spec, "cuda")


EDEN = GemmSpec("nvfp4", "absmax", 128, "before", "eden")
QUEST = GemmSpec("mxfp4", "floor", 32, "none")


@pytest.mark.parametrize("spec", [EDEN, QUEST], ids=["EDEN", "QuEST"])
def test_torch_sees_the_shapes_and_dtypes_that_the_ops_return(spec):
    ops = load(spec)
    x = torch.randn(40, 96)
    random = (SIGNS, SEED) if spec is EDEN else (None, None)
    for transposed in (False, True):
        torch.library.opcheck(
            ops.quantize, (x, None, None, *random, transposed, torch.bfloat16))
    if spec.is_packed:
        torch.library.opcheck(ops.quantize, (x, None, None, *random, True, torch.uint8))
    codes, scales = random_at_sizes(40, 96, 5)
    torch.library.opcheck(ops.quantize, (codes, scales, None, *random, True, torch.bfloat16))
    mask = torch.ones(40, 4, dtype=torch.int32)
    factor = torch.ones(1, 1)
    product = torch.randn(40, 128)
    torch.library.opcheck(
        ops.unrotate, (product, factor, factor, mask, random[0], torch.bfloat16))


@pytest.mark.parametrize("changes, sentence", [
    (dict(x=torch.ones(4, 40)), "the last dimension must be a multiple of 16, got 40"),
    (dict(x=torch.ones(64, 4).T), "x must be a contiguous float32 or bfloat16 matrix"),
    (dict(x=torch.ones(4, 64).half()), "x must be a contiguous float32 or bfloat16 matrix"),
    (dict(x=torch.ones(0, 64)), "x must not be empty"),
    (dict(factor=torch.ones(3, 1)), "factor must be [1, 1] or [4, 1], got [3, 1]"),
    (dict(signs=None), "signs is missing"),
    (dict(signs=WORDS), "signs must have 2 element(s), got 4"),
    (dict(seed=None), "seed is missing"),
    (dict(dtype=torch.float64), "dtype must be float32 or bfloat16"),
    (dict(dtype=torch.uint8), "only MXFP4 can be packed"),
    (dict(x_scales=torch.ones(4, 2).byte()), "codes must be"),
    (dict(x=torch.ones(4, 32).byte(), x_scales=torch.ones(3, 2).byte(), transposed=True),
     "codes [M, K/2] and scales [M, K/32] do not match"),
    (dict(x=torch.ones(4, 32).byte(), x_scales=torch.ones(4, 2).byte()),
     "a packed x is only quantised transposed"),
    (dict(x=torch.ones(4, 32).byte()), "x must be a contiguous float32 or bfloat16 matrix"),
    (dict(operand_format=1), "operand_format must be 0 (packed), 2 (fp8_left) or 3 (fp8_right)"),
    (dict(operand_format=2), "only what is packed can be put into tiles"),
])
def test_what_an_op_cannot_take_is_refused_with_a_sentence(changes, sentence):
    arguments = dict(x=torch.ones(4, 64), x_scales=None, factor=None, signs=SIGNS, seed=SEED,
                     transposed=False, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        load(EDEN).quantize(*(arguments | changes).values())


@pytest.mark.parametrize("operand_format, sentence", [
    (2, "tiles are for a GPU"), (3, "a right operand in tiles is quantised transposed")])
def test_tiles_that_no_product_takes_are_refused_with_a_sentence(operand_format, sentence):
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        load(QUEST).quantize(
            torch.ones(4, 64), None, None, None, None, False, torch.uint8, operand_format)


def test_a_mask_or_a_product_that_does_not_fit_is_refused_with_a_sentence():
    factor = torch.ones(1, 1)
    mask = torch.ones(4, 2, dtype=torch.int32)
    for columns_of_product, sentence in ((96, "mask [M, K/32] does not match the product"),
                                         (80, "the last dimension must be a multiple of 32")):
        product = torch.ones(4, columns_of_product)
        with pytest.raises(RuntimeError, match=re.escape(sentence)):
            load(QUEST).unrotate(product, factor, factor, mask, None, torch.float32)


# ---- rows on kernels

ROWS = {name: row for name, row in RECIPES.items() if not row.method and not row.has_kernels
        and row.is_quantized}
ROWS["eden-in-all"] = fp4.recipe(
    "fp4", rounding="eden:eden:eden", signs="before:before:before")
# w in squares is packed, reused in dgrad, and x is not read quantised in wgrad
ROWS["nvfp4-in-mxfp4"] = fp4.recipe("nvfp4", format="mxfp4", rounding="nearest")
ROWS["gradients-of-packed"] = fp4.recipe("fp4", format="mxfp4:nvfp4:int4")
ROWS["absmax"] = fp4.recipe("fp4", scale="absmax")                  # rotated, without a mask
ROWS["rotation-128"] = fp4.recipe("fp4", rotation="128")
ROWS["mse-floor"] = fp4.recipe("fp4", scale="mse/floor:pma/absmax34:absmax34")
ROWS["eden-forward"] = fp4.recipe("fp4", rounding="eden:nearest:nearest")
ROWS["mean-split"] = fp4.recipe("fp4", mean_split="on")
ROWS["mean-split-nvfp4"] = fp4.recipe("nvfp4", mean_split="on")
ROWS["multiplied"] = fp4.recipe("fp4", multiplier="0.84/1")
ROWS["mxfp8-mxfp4"] = fp4.recipe("fp4", format="mxfp8/mxfp4:mxfp4:mxfp4/int4")
# w in squares has a mask and a rotation to undo, which x does not share
ROWS["squares-of-another-rule"] = fp4.recipe(
    "nvfp4", format="nvfp4/mxfp4:nvfp4:nvfp4", rotation="32:none:16", rounding="nearest")
PACKED_ROWS = [name for name, row in ROWS.items() if row.has_packed_products]


@pytest.mark.parametrize("name", ROWS)
def test_all_quantisers_of_a_row_are_known_before_it_runs(name, monkeypatch):
    asked_for = set()

    class Ops(dict):
        def get(self, name):
            asked_for.add(name)

    monkeypatch.setattr(columns, "ops", Ops())
    run_passes(ROWS[name], *make_data())
    assert asked_for == set(named(columns.quantizers_of(ROWS[name])))


@pytest.mark.parametrize("name", PACKED_ROWS)
def test_the_product_of_packed_operands_is_that_of_their_values(name, monkeypatch):
    "in float32, where both are exact up to their sums"
    data = make_data(40, 80, 48)

    def passes():
        torch.manual_seed(3)
        return run_passes(ROWS[name], *data)

    results = passes()
    monkeypatch.setattr(GemmSpec, "is_packed", False)
    for of_packed, of_values in zip(results, passes()):
        assert (of_packed - of_values).abs().max() <= 2e-6 * of_values.abs().max()


def test_what_a_packed_product_leaves_for_the_backward_pass_is_packed():
    x, w, _ = make_data(64, 128, 96)
    _, saved = matmul.forward(x, w, ROWS["eden-in-all"])
    for quantized, matrix in ((saved.x_quantized, x), (saved.w_quantized, w)):
        assert 8 * (quantized.values.nbytes + quantized.scales.nbytes) == 4.25 * matrix.numel()
    assert saved.x is None and saved.w is w


def test_a_layer_has_the_backend_of_its_packed_products_and_its_quantisers_are_loaded(monkeypatch):
    assert fp4.Linear(64, 32, ROWS["fp4-bwd"]).backend is fp4.build()
    assert fp4.Linear(64, 32, ROWS["nvfp4"]).backend is None
    monkeypatch.setattr(columns, "ops", {})
    monkeypatch.setattr(columns, "has_kernel", lambda spec, square: False)
    assert fp4.Linear(64, 32, ROWS["fp4-bwd"], backend="a backend").backend == "a backend"
    assert columns.ops == dict.fromkeys(named(columns.quantizers_of(ROWS["fp4-bwd"])))


class WantsTiles:
    @staticmethod
    def format_for(tensor): return "fp8"


@pytest.mark.parametrize("name", PACKED_ROWS)
def test_the_operands_of_a_gradient_are_written_as_the_backend_multiplies_them(name, monkeypatch):
    """Here they are packed for all that, with a dimension more. Products take that away again."""
    row = ROWS[name]
    x, w, dy = make_data(40, 80, 48)
    asked_for = []
    quantize = columns.quantize_operand

    def quantize_in_tiles(matrix, spec, transposed, factor, square, scales, operand_format, *rest):
        asked_for.append((operand_format, transposed))
        values, *others = quantize(
            matrix, spec, transposed, factor, square, scales, "packed", *rest)
        return values if operand_format == "packed" else values[None], *others

    def gemm_operands(a, b, shape, alpha, dtype):
        product = ops.gemm(Packed(a.codes[0], a.scales), Packed(b.codes[0], b.scales), alpha, dtype)
        assert product.shape == shape
        return product

    def gemm_unrotate(a, b, mask, alpha, dtype):
        product = gemm_operands(a, b, (mask.shape[0], 32 * mask.shape[1]), alpha, torch.float32)
        return ops.unrotate(product, mask, dtype)

    def gradients(backend):
        torch.manual_seed(3)
        _, saved = matmul.forward(x, w, row)
        return matmul.backward(dy, saved, row, backend)

    columns.prepare(row)
    expected = gradients(None)
    monkeypatch.setattr(columns, "quantize_operand", quantize_in_tiles)
    monkeypatch.setattr(ops, "gemm_operands", gemm_operands)
    monkeypatch.setattr(ops, "gemm_unrotate", gemm_unrotate)
    for result, want in zip(gradients(WantsTiles), expected):
        assert (result - want).norm() <= 1e-6 * want.norm()
    is_tiled = [spec is not None and spec.is_packed for spec in (row.dgrad, row.wgrad)]
    tiled = [("fp8_left", False), ("fp8_right", True)] * is_tiled[0]
    tiled += [("fp8_left", True), ("fp8_right", True)] * is_tiled[1]
    assert [each for each in asked_for if each[0] != "packed"] == tiled

    monkeypatch.setattr(columns, "ops", {})             # The definition writes no tiles.
    asked_for.clear()
    gradients(WantsTiles)
    assert {operand_format for operand_format, _ in asked_for} == {"packed"}


@needs_gpu
@pytest.mark.parametrize("name", [name for name, (spec, _) in TABLE.items() if spec.is_packed])
def test_operands_in_tiles_have_the_product_of_packed_ones_bit_for_bit(name):
    if fp4.build().operand_format != "fp8":
        pytest.skip("this GPU's product takes no tiles")
    quantize = load(*TABLE[name]).quantize
    random = moved("cuda", SIGNS, SEED)
    for M, K in ((200, 336), (1100, 720)):
        x = values_of_all_sizes(M, K).cuda()
        for transposed in (False, True):
            products = []
            for left, right in ((0, 0), (2, 3)):        # packed; FP8 tiles
                a = quantize(x, None, None, *random, transposed, torch.uint8, left)
                other = x if transposed else x.T.contiguous()
                b = quantize(other, None, None, *random, True, torch.uint8, right)
                rows = x.shape[transposed]
                if left:
                    products.append(ops.gemm_operands(
                        Packed(*a[:2]), Packed(*b[:2]), (rows, rows), 1., torch.float32))
                else:
                    products.append(ops.gemm(Packed(*a[:2]), Packed(*b[:2]), 1., torch.float32))
            same(moved("cpu", products[0]), moved("cpu", products[1]))


@needs_gpu
@pytest.mark.parametrize("name", ROWS)
def test_a_compiled_layer_of_the_gpu_is_that_of_the_cpu_up_to_its_products_rounding(
        name, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(matmul, "words", lambda dy, x, n: torch.arange(n, device=dy.device) * 7919)
    x, w, dy = make_data(200, 192, 176)
    results = []
    for device in ("cpu", "cuda"):
        layer = fp4.Linear(192, 176, ROWS[name]).to(device)
        with torch.no_grad():
            layer.weight.copy_(w)
        a = x.bfloat16().to(device).requires_grad_()
        y = torch.compile(layer, fullgraph=True)(a) if device == "cuda" else layer(a)
        y.backward(dy.bfloat16().to(device))
        results.append([t.float().cpu() for t in (y.detach(), a.grad, layer.weight.grad)])
    for on_cpu, on_gpu in zip(*results):
        assert (on_gpu - on_cpu).norm() <= 5e-3 * on_cpu.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROWS)
def test_a_layer_on_kernels_has_the_bytes_of_one_without(name, dtype, monkeypatch):
    x, w, dy = make_data(40, 80, 48)
    data = (x.to(dtype), w, dy.to(dtype))

    def passes():
        torch.manual_seed(3)
        return layer_passes(ROWS[name], *data)

    on_kernels = passes()
    for each in columns.quantizers_of(ROWS[name]):
        assert bool(columns.ops[columns_name(*each)]) == columns.has_kernel(*each)
    monkeypatch.setattr(columns, "ops", {})
    monkeypatch.setattr(columns, "has_kernel", lambda spec, square: False)
    same(passes(), on_kernels)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("on_kernels", [True, False])
@pytest.mark.parametrize("name", ROWS)
def test_a_layer_that_is_given_no_tokens_has_gradients_of_zero(
        name, on_kernels, device, monkeypatch):
    if not on_kernels:
        monkeypatch.setattr(columns, "ops", {})
        monkeypatch.setattr(columns, "has_kernel", lambda spec, square: False)
    torch.full((1000,), torch.nan, device=device)       # Memory that is used again is no zero.
    layer = fp4.Linear(64, 96, ROWS[name]).to(device)
    x = torch.zeros(0, 64, device=device, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 96) and x.grad.shape == (0, 64)
    assert torch.equal(layer.weight.grad, torch.zeros(96, 64, device=device))


@pytest.mark.parametrize("name, has_kernel", [
    ("quartet2", True), ("eden-in-all", True), ("nvfp4-in-mxfp4", True),
    ("gradients-of-packed", True), ("fp4-pma", False)])
def test_compiled_by_torch_a_layer_is_the_same(name, has_kernel, monkeypatch):
    "on kernels, which torch does not look into, and without them"
    if not has_kernel:
        monkeypatch.setattr(columns, "ops", {})
        monkeypatch.setattr(columns, "has_kernel", lambda spec, square: False)
    same(*eager_and_compiled(ROWS[name]))


def test_compiled_by_torch_a_split_mean_is_the_same_up_to_the_order_of_its_sum():
    for eager, compiled in zip(*eager_and_compiled(ROWS["mean-split"])):
        assert (eager - compiled).norm() <= 5e-3 * eager.norm()


def eager_and_compiled(row):
    "-> y, dx, dw of a layer, and the same when it is compiled"
    torch.compiler.reset()
    x, w, dy = make_data(40, 80, 48)
    layer = fp4.Linear(80, 48, row)
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        a = x.clone().requires_grad_()
        layer.weight.grad = None
        torch.manual_seed(3)
        y = run(a)
        y.backward(dy)
        results.append((y.detach(), a.grad, layer.weight.grad))
    return results


def test_where_a_kernel_does_not_build_a_line_says_why_and_the_definition_runs(
        monkeypatch, capsys):
    def fail(spec, square):
        raise RuntimeError("no compiler here\nand more lines")

    monkeypatch.setattr(columns, "ops", {})
    monkeypatch.setattr(columns, "load_columns", fail)
    results = [layer_passes(ROWS["mxfp8"], *make_data()) for _ in range(2)]
    assert all(result.isfinite().all() for result in results[0])
    assert capsys.readouterr().err == (
        "fp4 quantises mxfp8_absmax_0_none_nearest in PyTorch, which is slow, because its kernel "
        "did not build: no compiler here\n")


def test_a_scale_rule_of_ones_own_and_squares_of_mxfp4_have_no_kernel():
    assert not columns.has_kernel(EDEN._replace(scale="mine"), False)
    assert not columns.has_kernel(QUEST, True) and columns.has_kernel(QUEST, False)
    assert not columns.has_kernel(EDEN, True)
