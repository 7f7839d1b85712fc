"""Faults in the methods that Quartet was compared with, and the tests that notice them."""
from tools.mutants import Mutant

FILE = "fp4/emulate/baselines.py"
RECIPES = "tests/test_recipes.py::test_"
SHARE = (RECIPES + "stochastic_rounding_goes_up_for_exactly_the_share_of_noise_that_is_its_"
         "probability[powers]")


def stated(name):
    return f"tests/test_baselines.py::test_a_row_is_the_method_written_out[{name}]"


def in_bfloat16(name):
    return ("tests/test_baselines.py::test_a_row_in_bfloat16_is_the_method_written_out_up_to_the_"
            f"rounding_of_results[{name}]")


MUTANTS = [
    # ---- LUQ
    Mutant("SAWB's clipping value has the constants the other way round", FILE,
           "12.1 * mean(size.square()).sqrt() - 12.2 * mean(size)",
           "12.2 * mean(size.square()).sqrt() - 12.1 * mean(size)", stated("luq-int4")),
    Mutant("SAWB's step is that of 16 steps", FILE,
           "return nonzero(clip * 2 / 15)", "return nonzero(clip * 2 / 16)", stated("luq-int4")),
    Mutant("SAWB's root is taken of the mean", FILE,
           "12.1 * mean(size.square()).sqrt()", "12.1 * mean(size).square().sqrt()",
           stated("luq-int4")),
    Mutant("LUQ's INT4 is symmetric", FILE, ".clamp(-8, 7).round()", ".clamp(-7, 7).round()",
           stated("luq-int4")),
    Mutant("LUQ's INT4 is cut off, not rounded", FILE, ".clamp(-8, 7).round()",
           ".clamp(-8, 7).trunc()", stated("luq-int4")),
    Mutant("a tensor of one magnitude has a negative step", FILE,
           "clip = torch.where(clip <= 0, absmax(v), clip)", "pass",
           RECIPES + "sawb_of_values_of_one_size_keeps_them"),
    Mutant("LUQ's gradient is rounded to nearest", FILE,
           "g = quantize_tensor(dy, POWERS_OF_TWO, absmax(dy) / 64, dy.dtype, noise)",
           "g = quantize_tensor(dy, POWERS_OF_TWO, absmax(dy) / 64, dy.dtype)",
           stated("luq-int4")),
    Mutant("LUQ's alpha is that of the uncorrected code", FILE,
           "absmax(dy) / 64, dy.dtype, noise)", "absmax(dy) / 128, dy.dtype, noise)",
           stated("luq-int4")),
    Mutant("LUQ's gradient has eight magnitudes", FILE,
           "POWERS_OF_TWO = Grid(mantissa_bits=0, min_exponent=0, max_value=64)",
           "POWERS_OF_TWO = Grid(mantissa_bits=0, min_exponent=-1, max_value=64)", SHARE),
    Mutant("LUQ's gradient has values between powers of two", FILE,
           "POWERS_OF_TWO = Grid(mantissa_bits=0, min_exponent=0, max_value=64)",
           "POWERS_OF_TWO = Grid(mantissa_bits=1, min_exponent=0, max_value=64)", SHARE),
    Mutant("LUQ's underflow is not stochastic", FILE,
           "noise = uniform(dy, x, dy.numel()).view_as(dy)",
           "noise = uniform(dy, x, dy.numel()).view_as(dy) * (dy.abs() * 64 >= absmax(dy))",
           stated("luq-fp4")),
    Mutant("luq-fp4's largest value becomes 4", FILE,
           "return quantize_tensor(v, E2M1, absmax(v) / 6, dtype)",
           "return quantize_tensor(v, E2M1, absmax(v) / 4, dtype)", stated("luq-fp4")),
    Mutant("luq-fp4 has the step of SAWB", FILE,
           "return quantize_tensor(v, E2M1, absmax(v) / 6, dtype)",
           "return quantize_tensor(v, E2M1, sawb_step(v), dtype)", stated("luq-fp4")),
    Mutant("LUQ's dw has the scale of w", FILE,
           "dw = scaled_matmul(g.values.T, x.T, g.scale * x_scale, torch.float32)",
           "dw = scaled_matmul(g.values.T, x.T, g.scale * w_scale, torch.float32)",
           stated("luq-fp4")),

    # ---- Jetfire
    Mutant("Jetfire's tiles are 16 x 16", FILE, "TILE = 32", "TILE = 16", stated("jetfire-fp4")),
    Mutant("Jetfire's tiles are stretches of 32 in one row", FILE,
           "    tiles = split_blocks(padded, TILE, square=True)\n"
           "    scale = block_max(tiles).clamp_min(1e-5) / 6\n"
           "    quantized = join_blocks(to_grid(tiles / scale, E2M1) * scale, rows, TILE, "
           "square=True)",
           "    tiles = split_blocks(padded, TILE, square=False)\n"
           "    scale = block_max(tiles).clamp_min(1e-5) / 6\n"
           "    quantized = join_blocks(to_grid(tiles / scale, E2M1) * scale, rows, TILE, "
           "square=False)",
           stated("jetfire-fp4")),
    Mutant("Jetfire's output stays unquantised", FILE,
           "return quantize_tiles(xq @ wq.T, x.dtype), (xq, wq)", "return xq @ wq.T, (xq, wq)",
           stated("jetfire-fp4")),
    Mutant("Jetfire's dx stays unquantised", FILE,
           "dx = quantize_tiles(g @ w, dy.dtype)", "dx = g @ w", stated("jetfire-fp4")),
    Mutant("Jetfire's dw has the unquantised gradient", FILE,
           "dw = scaled_matmul(g.T, x.T, 1., torch.float32)",
           "dw = scaled_matmul(dy.T, x.T, 1., torch.float32)", stated("jetfire-fp4")),
    Mutant("Jetfire's smallest scale is 1e-2", FILE, "clamp_min(1e-5)", "clamp_min(1e-2)",
           stated("jetfire-fp4")),
    Mutant("Jetfire's largest value becomes 7", FILE,
           "scale = block_max(tiles).clamp_min(1e-5) / 6",
           "scale = block_max(tiles).clamp_min(1e-5) / 7", stated("jetfire-fp4")),

    # ---- HALO
    Mutant("HALO clips nothing", FILE, "absmax(v) / 6 * .75", "absmax(v) / 6",
           stated("halo-fp4")),
    Mutant("HALO's scale is divided by 3/4", FILE, "absmax(v) / 6 * .75", "absmax(v) / 6 / .75",
           stated("halo-fp4")),
    Mutant("HALO's rotation spans 32", FILE,
           "def halo_rotation(n): return min(n & -n, 1024)", "def halo_rotation(n): return 32",
           RECIPES + "halo_rotates_by_the_largest_power_of_two_that_divides_the_axis_up_to_1024"),
    Mutant("HALO's rotation has no limit", FILE, "return min(n & -n, 1024)", "return n & -n",
           RECIPES + "halo_rotates_by_the_largest_power_of_two_that_divides_the_axis_up_to_1024"),
    Mutant("HALO's gradient is not rotated for dx", FILE,
           "g = halo_quantize(rotate(dy.T, n).T, dy.dtype)", "g = halo_quantize(dy, dy.dtype)",
           stated("halo-fp4")),
    Mutant("HALO's dx stays in the rotated basis", FILE,
           "dx = cast(rotate(dx.T, n).T, dy.dtype)", "dx = cast(dx, dy.dtype)",
           stated("halo-fp4")),
    Mutant("HALO's dx is rotated along the features", FILE,
           "dx = cast(rotate(dx.T, n).T, dy.dtype)", "dx = cast(rotate(dx, n), dy.dtype)",
           stated("halo-fp4")),
    Mutant("HALO's x is rotated for dw", FILE,
           "xq = halo_quantize(x, dy.dtype)",
           "xq = halo_quantize(rotate(x, halo_rotation(x.shape[1])), dy.dtype)",
           stated("halo-fp4")),
    Mutant("HALO's weight is not rotated in the forward pass", FILE,
           "wq = halo_quantize(rotate(w, n), x.dtype)", "wq = halo_quantize(w, x.dtype)",
           stated("halo-fp4")),

    # ---- LSS
    Mutant("LSS's step is 0.4 of the deviation", FILE, "INT4, .354 * mean(", "INT4, .4 * mean(",
           stated("lss-int4")),
    Mutant("LSS rotates by 16", FILE, "LSS_ROTATION = 32", "LSS_ROTATION = 16",
           stated("lss-int4")),
    Mutant("what LSS clips gets a gradient", FILE, "v.abs() < 7 * quantized.scale",
           "v.abs() < 70 * quantized.scale", stated("lss-int4")),
    Mutant("LSS's kept rows are not divided by their probability", FILE,
           "torch.where(u < p, 1 / p, 0.)", "torch.where(u < p, 1., 0.)", stated("lss-int4")),
    Mutant("LSS keeps all rows", FILE, "torch.where(u < p, 1 / p, 0.)", "torch.ones_like(p)",
           stated("lss-int4")),
    Mutant("LSS keeps a quarter of the rows", FILE,
           "p = (M * weight / total(weight)).clamp_max(1)",
           "p = (M / 2 * weight / total(weight)).clamp_max(1)", stated("lss-int4")),
    Mutant("LSS keeps rows with the same probability", FILE,
           "p = (M * weight / total(weight)).clamp_max(1)",
           "p = torch.full_like(weight, .5)", stated("lss-int4")),
    Mutant("LSS's probability for dw leaves x out", FILE,
           "    weight = weight * row_norms(saved.x).repeat(2)\n", "", stated("lss-int4")),
    Mutant("LSS samples dw's rows with dx's numbers", FILE,
           "sampled = lss_sample(halves, weight, u_dw, dy.dtype)",
           "sampled = lss_sample(halves, weight, u_dx, dy.dtype)", stated("lss-int4")),
    Mutant("LSS has no residual", FILE,
           "return torch.cat((high_part, low.values * low.scale))",
           "return torch.cat((high_part, 0 * low.values))", stated("lss-int4")),
    Mutant("LSS's residual is rounded to nearest", FILE,
           "high.scale.squeeze() / 14, torch.float32, noise)",
           "high.scale.squeeze() / 14, torch.float32)", stated("lss-int4")),
    Mutant("LSS's residual has the step of a full 4-bit integer", FILE,
           "high.scale.squeeze() / 14, torch.float32, noise)",
           "high.scale.squeeze() / 7, torch.float32, noise)", stated("lss-int4")),
    Mutant("LSS's gradients are masked after the rotation is undone", FILE,
           "return cast(rotate(grad * mask, LSS_ROTATION)[:, :columns], grad.dtype)",
           "return cast((rotate(grad, LSS_ROTATION) * mask)[:, :columns], grad.dtype)",
           stated("lss-int4")),

    # ---- what they share
    Mutant("a tensor's scale of 0 stays 0", FILE,
           "def nonzero(scale): return torch.where(scale == 0, 1., scale)",
           "def nonzero(scale): return scale", RECIPES + "zeros_stay_zeros_in_every_row"),
    Mutant("the means are sums", FILE, "return v.double().mean().float()",
           "return v.double().sum().float()", stated("luq-int4")),
    Mutant("the norm of a row is its square", FILE,
           "return v.double().square().sum(1).sqrt().float()",
           "return v.double().square().sum(1).float()", stated("lss-int4")),
    Mutant("values are divided by the scale in bfloat16", FILE,
           "to_grid(v.float() / scale, grid, noise)",
           "to_grid((v.bfloat16() / scale.bfloat16()).float(), grid, noise)",
           in_bfloat16("luq-fp4")),
]
