"""Faults in the definition, and the tests that notice them. Each takes about three seconds."""
from tools.mutants import Mutant

FILE = "fp4/reference.py"
TESTS = "tests/test_reference.py::"
SIZES = "tests/test_kernels.py::test_blocks_of_every_size_are_quantised_as_the_definition_says"
FEW = TESTS + "test_the_product_of_few_rows_is_that_of_its_sums_written_out"

MUTANTS = [
    # ---- the format
    Mutant("code 5 is 3.5", FILE,
           "E2M1 = (0., .5, 1., 1.5, 2., 3., 4., 6.)", "E2M1 = (0., .5, 1., 1.5, 2., 3.5, 4., 6.)",
           TESTS + "test_every_code_decodes_as_the_standard_lists_it"),
    Mutant("the even element is in the high half of a byte", FILE,
           "torch.stack((codes & 15, codes >> 4), -1)", "torch.stack((codes >> 4, codes & 15), -1)",
           TESTS + "test_every_code_decodes_as_the_standard_lists_it"),
    Mutant("packing swaps the halves of a byte", FILE,
           "code[:, 0::2] | (code[:, 1::2] << 4)", "code[:, 1::2] | (code[:, 0::2] << 4)",
           TESTS + "test_the_mask_has_what_lies_below_6_before_it_is_rounded"),
    Mutant("the bias of a scale is 126 when it is packed", FILE,
           "e + 127, 255", "e + 126, 255", TESTS + "test_one_block_by_hand"),
    Mutant("the bias of a scale is 128 when it is unpacked", FILE,
           "clamp_max(254) - 127", "clamp_max(254) - 128",
           TESTS + "test_scale_bytes_are_powers_of_two_and_255_is_nan"),
    Mutant("scale 255 is a number", FILE,
           "torch.where(scales == 255, torch.nan, pow2(scales.int().clamp_max(254) - 127))",
           "pow2(scales.int().clamp_max(254) - 127)",
           TESTS + "test_scale_bytes_are_powers_of_two_and_255_is_nan"),
    Mutant("the smallest scale, a subnormal number, becomes 0", FILE,
           "((e.long() + 1023) << 52).view(torch.float64).float()",
           "((e.int() + 127) << 23).view(torch.float32)",
           TESTS + "test_scale_bytes_are_powers_of_two_and_255_is_nan"),
    Mutant("the bits of a mask are in the reverse order", FILE,
           "mask.long() << torch.arange(32, device=mask.device)",
           "mask.long() << torch.arange(31, -1, -1, device=mask.device)",
           TESTS + "test_what_reaches_6_exactly_is_not_in_the_mask"),

    # ---- the rotation
    Mutant("the butterfly subtracts a from b", FILE,
           "(a + b, a - b)) * HADAMARD_NORM", "(a + b, b - a)) * HADAMARD_NORM",
           TESTS + "test_the_rotation_is_the_product_with_sylvesters_matrix"
           "_which_is_its_own_inverse"),
    Mutant("the butterfly swaps sum and difference", FILE,
           "(a + b, a - b)) * HADAMARD_NORM", "(a - b, a + b)) * HADAMARD_NORM",
           TESTS + "test_the_rotation_is_the_product_with_sylvesters_matrix"
           "_which_is_its_own_inverse"),
    Mutant("the rotation's norm is BF16's", FILE,
           "HADAMARD_NORM = 32 ** -.5", "HADAMARD_NORM = .1767578125",
           TESTS + "test_the_rotation_is_the_product_with_sylvesters_matrix"
           "_which_is_its_own_inverse"),
    Mutant("only 16 elements are rotated together", FILE,
           "while stride < v.shape[-1]:", "while stride < v.shape[-1] // 2:",
           TESTS + "test_the_rotation_is_the_product_with_sylvesters_matrix"
           "_which_is_its_own_inverse"),
    Mutant("the butterfly takes its strides from the largest on, so that it rounds otherwise", FILE,
           "(-1, 2, stride)", "(-1, 2, v.shape[-1] // stride // 2)", SIZES),

    # ---- QuEST
    Mutant("QuEST's constant is 2.9", FILE, "= 2.92247856 / 6", "= 2.9 / 6",
           TESTS + "test_the_forward_quantiser_and_its_mask_equal_the_published_one_bit_for_bit"
           "_but_for_ties"),
    Mutant("QuEST's constant is divided by 8", FILE, "= 2.92247856 / 6", "= 2.92247856 / 8",
           TESTS + "test_the_forward_quantiser_and_its_mask_equal_the_published_one_bit_for_bit"
           "_but_for_ties"),
    Mutant("1e-6 is added to the scale", FILE, "+ 1e-8 ", "+ 1e-6 ",
           TESTS + "test_one_block_by_hand"),
    Mutant("QuEST's scale is of the root mean square", FILE,
           "total(v * v) / 32 - mean.square()", "total(v * v) / 32 - 0 * mean",
           TESTS + "test_one_block_by_hand"),
    Mutant("the variance is of a sample", FILE,
           "variance = total(v * v) / 32 - mean.square()",
           "variance = (total(v * v) / 32 - mean.square()) * 32 / 31",
           TESTS + "test_the_forward_quantiser_and_its_mask_equal_the_published_one_bit_for_bit"
           "_but_for_ties"),
    Mutant("a negative variance is not clamped", FILE,
           "variance = variance.clamp_min(0) ", "variance = variance ",
           TESTS + "test_a_constant_rotated_block_is_finite_although_rounding_makes_its_variance"
           "_negative"),
    Mutant("a NaN of the variance is hidden", FILE,
           "variance = variance.clamp_min(0) ",
           "variance = torch.where(variance > 0, variance, 0) ",
           TESTS + "test_what_is_not_finite_reaches_every_output"),
    Mutant("the root is torch's of float32, whose last bit may be wrong", FILE,
           "variance.double().sqrt().float()", "variance.sqrt()",
           "tests/test_kernels.py::test_a_scale_at_the_edge_of_a_power_of_two_is_the_definitions"),
    Mutant("the scale is the power of two above", FILE,
           "e = floor_log2(best)\n", "e = floor_log2(best) + 1\n",
           TESTS + "test_one_block_by_hand"),
    Mutant("nearest rounds up from 1.5 on", FILE, "mantissa > .5 ** .5", "mantissa > .75",
           SIZES),
    Mutant("6 itself is in the mask", FILE, "(u.abs() < 6) & finite", "(u.abs() <= 6) & finite",
           TESTS + "test_what_reaches_6_exactly_is_not_in_the_mask"),
    Mutant("the mask is of what was rounded", FILE,
           "bits((u.abs() < 6) & finite)", "bits((round_nearest(u) & 7 < 7) & finite)",
           TESTS + "test_the_mask_has_what_lies_below_6_before_it_is_rounded"),
    Mutant("a block that is not finite has a mask", FILE,
           "bits((u.abs() < 6) & finite)", "bits(~(u.abs() >= 6))",
           SIZES),

    # ---- rounding
    Mutant("ties go up", FILE, "code + (magnitude > midpoint)", "code + (magnitude >= midpoint)",
           TESTS + "test_rounding_to_nearest_agrees_with_a_search_in_float64_and_ties_go_to_the"
           "_even_code"),
    Mutant("ties go to zero, as in the published code", FILE,
           "code + (magnitude >= midpoint)", "code + (magnitude > midpoint)",
           TESTS + "test_rounding_to_nearest_agrees_with_a_search_in_float64_and_ties_go_to_the"
           "_even_code"),
    Mutant("the middle between 4 and 6 is the geometric one", FILE,
           "(.25, 1.25, 2.5, 5.)", "(.25, 1.25, 2.5, 4.9)",
           TESTS + "test_rounding_to_nearest_agrees_with_a_search_in_float64_and_ties_go_to_the"
           "_even_code"),
    Mutant("noise is rounded to 256 and not to 255.5", FILE, "(255.5 - noise)", "(256 - noise)",
           TESTS + "test_as_many_of_the_256_noise_bytes_go_up_as_the_value_is_beyond_the_lower"
           "_point"),
    Mutant("p = 0 goes up with the largest noise", FILE, "(255.5 - noise)", "(255 - noise)",
           TESTS + "test_a_value_on_the_grid_is_rounded_stochastically_to_itself_by_every_byte"),
    Mutant("stochastic rounding goes up with 98 % of its probability", FILE,
           "(p >= (255.5 - noise) / 256)", "(.98 * p >= (255.5 - noise) / 256)",
           TESTS + "test_the_mean_of_stochastic_rounding_agrees_with_the_published_one[heavy]"),
    Mutant("stochastic rounding takes every step for .5", FILE,
           "(magnitude - grid[low]) / (grid[low + 1] - grid[low])", "(magnitude - grid[low]) / .5",
           TESTS + "test_the_mean_of_stochastic_rounding_agrees_with_the_published_one[heavy]"),
    Mutant("stochastic rounding loses the sign", FILE,
           "(255.5 - noise) / 256) + 8 * torch.signbit(u)", "(255.5 - noise) / 256)",
           TESTS + "test_as_many_of_the_256_noise_bytes_go_up_as_the_value_is_beyond_the_lower"
           "_point"),

    # ---- the noise
    Mutant("neighbours share their noise", FILE, "& 255).flatten()[:n]",
           "& 255).flatten()[torch.arange(n) // 2]",
           TESTS + "test_element_i_gets_byte_i_mod_16_of_call_i_div_16_of_philox"),
    Mutant("all blocks have the noise of the first", FILE,
           "& 255).flatten()[:n]", "& 255).flatten()[torch.arange(n) % 32]",
           TESTS + "test_neighbours_and_seeds_have_noise_of_their_own"),
    Mutant("the bytes of a word are big-endian", FILE,
           "torch.arange(0, 32, 8, device=seed.device)",
           "torch.arange(24, -8, -8, device=seed.device)",
           TESTS + "test_element_i_gets_byte_i_mod_16_of_call_i_div_16_of_philox"),
    Mutant("Philox has nine rounds", FILE, "for _ in range(10):", "for _ in range(9):",
           TESTS + "test_element_i_gets_byte_i_mod_16_of_call_i_div_16_of_philox"),
    Mutant("Philox ignores the upper half of the seed", FILE,
           "key = [seed & U32, (seed >> 32) & U32]", "key = [seed & U32, seed & 0]",
           TESTS + "test_neighbours_and_seeds_have_noise_of_their_own"),
    Mutant("Philox's keys are swapped in a round", FILE,
           "^ words[1] ^ key[0]) & U32, second", "^ words[1] ^ key[1]) & U32, second",
           TESTS + "test_element_i_gets_byte_i_mod_16_of_call_i_div_16_of_philox"),
    Mutant("a constant of Philox has a wrong digit", FILE, "0xCD9E8D57", "0xCD9E8D75",
           TESTS + "test_element_i_gets_byte_i_mod_16_of_call_i_div_16_of_philox"),

    # ---- the backward quantiser
    Mutant("the largest value is scaled into [2, 4)", FILE,
           "(floor_log2(largest) - 2)", "(floor_log2(largest) - 1)",
           TESTS + "test_one_block_by_hand"),
    Mutant("the factor is .7", FILE, "v * (.75 * pow2(-e))", "v * (.7 * pow2(-e))",
           TESTS + "test_the_backward_scale_of_a_block_of_any_size_is_the_one_found_by_hand"),
    Mutant("the exponent is not clamped", FILE,
           "(floor_log2(largest) - 2).clamp(-127, 127)", "(floor_log2(largest) - 2)",
           TESTS + "test_the_backward_scale_of_a_block_of_any_size_is_the_one_found_by_hand"),
    Mutant("the largest is not of the magnitudes", FILE,
           "v.abs().amax(-1, True)", "v.amax(-1, True)",
           TESTS + "test_the_backward_scale_of_a_block_of_any_size_is_the_one_found_by_hand"),
    Mutant("the signs come after the rotation", FILE,
           "v = hadamard(v * sign)\n", "v = hadamard(v) * sign\n",
           TESTS + "test_the_wrong_side_signs_randomise_nothing"),
    Mutant("the rotation is not random", FILE, "v = hadamard(v * sign)\n", "v = hadamard(v)\n",
           TESTS + "test_bit_i_of_the_signs_negates_element_i_of_every_block_at_its_place_in_the"
           "_order"),
    Mutant("only 16 bits of the signs are used", FILE,
           "sign = 1 - 2 * unbits(signs)", "sign = 1 - 2 * unbits(signs & 0xFFFF)",
           TESTS + "test_bit_i_of_the_signs_negates_element_i_of_every_block_at_its_place_in_the"
           "_order"),
    Mutant("without a rotation there still are signs", FILE,
           'elif sign_order == "after":\n        v = hadamard(v) * sign',
           'elif sign_order == "after":\n        v = hadamard(v) * sign\n    else:\n'
           "        v = v * sign",
           TESTS + "test_bit_i_of_the_signs_negates_element_i_of_every_block_at_its_place_in_the"
           "_order"),
    Mutant("Inf is packed as a number", FILE, "e, largest.isfinite())", "e, ~largest.isnan())",
           TESTS + "test_what_is_not_finite_reaches_every_output"),
    Mutant("a block of zeros keeps the signs of its zeros", FILE,
           "pack(torch.where(largest == 0, 0, code), e", "pack(code, e",
           SIZES),
    Mutant("dy and dy.T share a seed", FILE,
           "transpose_padded(x), signs, seeds[1]", "transpose_padded(x), signs, seeds[0]",
           "tests/test_kernels.py::test_every_noise_byte_meets_every_share_of_a_gap_as_in_the"
           "_definition"),
    Mutant("the transpose has the sign order of the rows", FILE,
           "seeds[1], stochastic, sign_order_t)", "seeds[1], stochastic, sign_order)",
           SIZES),
    Mutant("the tokens are padded with the first of them", FILE,
           "F.pad(x, (0, 0, 0, -x.shape[0] % 32)).T",
           "torch.cat((x, x[:1].expand(-x.shape[0] % 32, -1))).T",
           "tests/test_kernels.py::test_every_noise_byte_meets_every_share_of_a_gap_as_in_the"
           "_definition"),

    # ---- the way out
    Mutant("the gradient is masked after the rotation is undone", FILE,
           "hadamard(blocks(d) * unbits(mask))", "(hadamard(blocks(d)) * unbits(mask))",
           TESTS + "test_what_was_clipped_gets_no_gradient_before_the_rotation_is_undone_and_nan"
           "_stays"),
    Mutant("the mask selects, so that it hides a NaN", FILE,
           "hadamard(blocks(d) * unbits(mask))",
           "hadamard(torch.where(unbits(mask) > 0, blocks(d), 0))",
           TESTS + "test_what_was_clipped_gets_no_gradient_before_the_rotation_is_undone_and_nan"
           "_stays"),
    Mutant("the rotation is not undone", FILE,
           "hadamard(blocks(d) * unbits(mask))", "(blocks(d) * unbits(mask))",
           TESTS + "test_what_was_clipped_gets_no_gradient_before_the_rotation_is_undone_and_nan"
           "_stays"),
    Mutant("the product forgets alpha", FILE,
           "(alpha * (a @ b.T)).float()", "(a @ b.T).float()",
           "tests/test_ops.py::test_the_product_of_packed_matrices_is_that_of_their_values_times"
           "_alpha"),

    # ---- draws
    Mutant("only 16 signs are drawn", FILE,
           "signs = torch.randint(-2 ** 63, 2 ** 63 - 1, (1,)",
           "signs = torch.randint(0, 2 ** 16, (1,)",
           TESTS + "test_each_bit_of_the_signs_and_the_seeds_is_drawn_and_no_two_draws_agree"),
    Mutant("all seeds of a draw are equal", FILE,
           "2 ** 63 - 1, (n,), device=dy.device)", "2 ** 63 - 1, (1,), device=dy.device).expand(n)",
           TESTS + "test_each_bit_of_the_signs_and_the_seeds_is_drawn_and_no_two_draws_agree"),
    Mutant("the seeds are never negative", FILE,
           "seeds = torch.randint(-2 ** 63,", "seeds = torch.randint(0,",
           TESTS + "test_each_bit_of_the_signs_and_the_seeds_is_drawn_and_no_two_draws_agree"),
    Mutant("every draw is the same", FILE,
           "    signs = torch.randint(", "    torch.manual_seed(0)\n    signs = torch.randint(",
           TESTS + "test_each_bit_of_the_signs_and_the_seeds_is_drawn_and_no_two_draws_agree"),
    Mutant("a product of few rows adds up neighbouring blocks in a lane", FILE,
           "unflatten(-1, (-1, 32)).unbind(-2)\n    return total(",
           "unflatten(-1, (32, -1)).unbind(-1)\n    return total(", FEW),
    Mutant("a product of few rows rounds its terms to bfloat16", FILE,
           "terms * e8m0(x_scales)[:, None] * e8m0(w_scales)",
           "(terms * e8m0(x_scales)[:, None] * e8m0(w_scales)).bfloat16().float()", FEW),
    Mutant("a product of few rows has the scales of another row", FILE,
           "* e8m0(w_scales)\n", "* e8m0(w_scales.roll(1, 0))\n", FEW),
]
