"""Faults in the quantisers that are compiled for one GemmSpec, and the tests that notice them.

A fault in a kernel costs about 5 seconds, in which one quantiser is compiled anew.
"""
from tools.mutants import Mutant

BUILD = "fp4/build.py"
COLUMNS = "fp4/emulate/columns.py"
MATMUL = "fp4/emulate/matmul.py"
QUANTIZERS = "fp4/emulate/quantizers.py"
RECIPES = "fp4/recipes.py"
ARITHMETIC = "fp4/kernels/columns.cuh"
CPU = "fp4/kernels/columns_cpu.cpp"
BIND = "fp4/kernels/columns_bind.cpp"
GPU = "fp4/kernels/quantize_columns.cu"
TESTS = "tests/test_columns.py::test_"
PRODUCT = TESTS + "the_product_of_packed_operands_is_that_of_their_values"
LOADED = TESTS + "a_layer_has_the_backend_of_its_packed_products_and_its_quantisers_are_loaded"
TILES = TESTS + "the_operands_of_a_gradient_are_written_as_the_backend_multiplies_them"
REFUSED = TESTS + "what_an_op_cannot_take_is_refused_with_a_sentence"


def on_cpu(name):
    return TESTS + f"the_kernels_of_the_cpu_have_the_bytes_of_the_definition[{name}]"


def on_gpu(name):
    "the CUDA kernels, simulated"
    return ("tests/test_cuda_on_cpu.py::"
            f"test_the_kernels_of_a_gemm_spec_give_the_definitions_bytes[{name}]")


TILES_ON_GPU = ("tests/test_cuda_on_cpu.py::"
                "test_the_kernels_of_a_gemm_spec_write_fp8_tiles_of_what_is_packed"
                "[mxfp4_absmax34_32_before_nearest]")
EDEN = "nvfp4_absmax_128_before_eden"
STOCHASTIC = "nvfp4_absmax_16_before_stochastic"
SQUARE = "nvfp4_four_six_0_none_nearest_square"
PMA = "mxfp4_pma_32_before_nearest"
FLOOR = "mxfp4_floor_32_none_nearest"
MSE = "mxfp4_mse_32_none_eden"
ROW_EDEN = "mxfp4_pma_64_before_eden"

MUTANTS = [
    # ---- the arithmetic
    Mutant("all 32 signs of a rotation of 128 are the first ones", ARITHMETIC,
           "const int word = int(column / 32 % WORDS);", "const int word = 0;", on_cpu(EDEN)),
    Mutant("a rotation of 16 takes 32 signs", ARITHMETIC,
           "ROTATION == 16 ? (bits & 0xFFFF) * 0x10001u : bits", "bits", on_cpu(STOCHASTIC)),
    Mutant("b - a in place of a - b", ARITHMETIC,
           "other[w] + float_of(bits_of(v[i][w]) ^ is_b)",
           "v[i][w] + float_of(bits_of(other[w]) ^ is_b)", on_cpu(EDEN)),
    Mutant("lanes exchange with the wrong neighbour", ARITHMETIC,
           "32 * stride < ROTATION; stride *= 2)\n    exchange_stage<Lanes>(v, stride);",
           "32 * stride < ROTATION; stride *= 2)\n    exchange_stage<Lanes>(v, 3 - stride);",
           on_gpu(EDEN)),
    Mutant("a rotation is undone with its signs first", ARITHMETIC,
           "undo ? Signs::after : Signs::before", "Signs::before", on_cpu(EDEN)),
    Mutant("of the last stage of a rotation only a + b counts as a magnitude", ARITHMETIC,
           "fabsf(v[left][w]) + fabsf(v[left + stride][w])",
           "fabsf(v[left][w] + v[left + stride][w])", on_cpu(STOCHASTIC)),
    Mutant("lanes send the half that they keep", ARITHMETIC,
           "sent[w] = is_b ? v[i][w] : v[i + 16][w];", "sent[w] = is_b ? v[i + 16][w] : v[i][w];",
           on_cpu(EDEN)),
    Mutant("a NaN is lost among magnitudes", ARITHMETIC,
           "return float_of(a_bits > b_bits ? a_bits : b_bits);", "return a > b ? a : b;",
           on_cpu("mxfp8_absmax_0_none_nearest")),
    Mutant("square blocks have 8 rows", ARITHMETIC,
           "constexpr int SQUARE_ROWS = 16;", "constexpr int SQUARE_ROWS = 8;", on_cpu(SQUARE)),
    Mutant("E4M3 has smaller numbers than it has", ARITHMETIC,
           "MIN_EXPONENT = -6", "MIN_EXPONENT = -20", on_cpu(STOCHASTIC)),
    Mutant("noise is half a step too small", ARITHMETIC,
           "(255.5f - noise) / 256", "(256.f - noise) / 256", on_cpu(STOCHASTIC)),
    Mutant("two bytes of a word of noise are used", ARITHMETIC,
           "(8 * (i % 4))", "(8 * (i % 2))", on_cpu(STOCHASTIC)),
    Mutant("mse tries two exponents", ARITHMETIC,
           "candidate < 3", "candidate < 2", on_cpu(MSE)),
    Mutant("a block that is not finite keeps a scale", ARITHMETIC,
           "scale[w] = finite ? scale[w] : float_of(BITS_OF_NAN);", "(void)finite;",
           on_cpu(FLOOR)),
    Mutant("pma has no factor 3/4", ARITHMETIC,
           "SCALE == Scale::absmax34 || SCALE == Scale::pma;", "SCALE == Scale::absmax34;",
           on_cpu(PMA)),
    Mutant("pma undoes nothing", ARITHMETIC, "1.009276 : 1;", "1 : 1;", on_cpu(PMA)),
    Mutant("the mask is of what reaches the end of the grid", ARITHMETIC,
           "fabsf(u[i][w]) < Elements::MAX_VALUE", "fabsf(u[i][w]) <= .9f * Elements::MAX_VALUE",
           on_cpu(FLOOR)),
    Mutant("EDEN's S of a block of zeros is NaN", ARITHMETIC,
           "return vq == 0 ? 1 : vv / vq;", "return vv / vq;", on_cpu(ROW_EDEN)),
    Mutant("NVFP4's largest scale is 440", ARITHMETIC, "? 448 : 256;", "? 440 : 256;",
           on_cpu(STOCHASTIC)),
    Mutant("the inverse of a small scale is infinite", ARITHMETIC,
           "exact > LARGEST_FLOAT ? LARGEST_FLOAT : exact", "exact", on_cpu(STOCHASTIC)),
    Mutant("a squared error is multiplied by its scale once", ARITHMETIC,
           "error[b][w] *= scale[b][w] * scale[b][w];", "error[b][w] *= scale[b][w];",
           on_cpu(SQUARE)),
    Mutant("four-six keeps the worse scale", ARITHMETIC,
           "error_of_larger[b][w] < error[b][w]", "error_of_larger[b][w] > error[b][w]",
           on_cpu(SQUARE)),
    Mutant("both blocks of a lane have the first one's noise", ARITHMETIC,
           "noise_of<Lanes>(noise, b * BLOCK_SIZE, w)", "noise_of<Lanes>(noise, 0, w)",
           on_cpu(EDEN)),

    Mutant("a scale is 2^-126 at least", ARITHMETIC,
           "pow2(e > -127 ? e : -127)", "pow2(e > -126 ? e : -126)", on_cpu(PMA)),
    Mutant(".5 has the code of 0", ARITHMETIC,
           "top_bits < 1 ? top_bits : 1", "top_bits < 1 ? top_bits : 0", on_cpu(MSE)),
    Mutant("a block that is not finite has codes", ARITHMETIC,
           "is_finite(scale[w]) ? words[n][w] : 0", "words[n][w]", on_cpu(FLOOR)),
    Mutant("what is packed has been multiplied by its scale", ARITHMETIC,
           "packs ? u[i][w] : u[i][w] * scale[w]", "u[i][w] * scale[w]", on_cpu(FLOOR)),
    Mutant("neighbours change places in a byte", ARITHMETIC, "<< (4 * i);", "<< (4 * (i ^ 1));",
           on_cpu(FLOOR)),

    # ---- the CPU
    Mutant("all blocks of a packed row have the scale of the first", CPU,
           "e2m1_value(code) * scale[j]", "e2m1_value(code) * scale[0]", on_cpu(FLOOR)),
    Mutant("the codes of a packed word are read backwards", CPU,
           "(codes[j] >> (4 * r)) & 15", "(codes[j] >> (28 - 4 * r)) & 15", on_cpu(EDEN)),
    Mutant("the factor of a packed row is that of its column", CPU,
           "factor[j] = factor_of(op, memory_row);", "factor[j] = factor_of(op, row);",
           on_cpu(EDEN)),
    Mutant("the noise of a row is that of an unpadded matrix", CPU,
           "(row + row_of_lane(w)) * op.padded", "(row + row_of_lane(w)) * op.columns",
           on_cpu(STOCHASTIC)),
    Mutant("the factor of a row is that of its column", CPU,
           "factor_of(op, memory_row);\n}", "factor_of(op, row);\n}", on_cpu(FLOOR)),
    Mutant("the largest magnitude is that of the last group", CPU,
           "bits_of(of_lane[w]) > known &&", "bits_of(of_lane[w]) != known &&",
           on_cpu(STOCHASTIC)),
    Mutant("the last sum of a row is left out", CPU,
           "i + stride < blocks", "i + stride + 1 < blocks", on_cpu(ROW_EDEN)),

    # ---- the GPU
    Mutant("a tile is read before it is filled", GPU,
           "    __syncthreads();\n    const T* values", "    const T* values", on_gpu(FLOOR)),
    Mutant("a row's padding is the next row", GPU,
           "i < n ? to_float(x[i]) : 0", "i < n + 16 && n > 0 ? to_float(x[i]) : 0",
           on_gpu(FLOOR)),
    Mutant("the largest magnitude is that of the first lanes of a warp", GPU,
           "UNROLL for (int n = 1; n < 32; n *= 2) {", "UNROLL for (int n = 1; n < 4; n *= 2) {",
           on_gpu(STOCHASTIC)),
    Mutant("all warps leave their largest magnitude in one place", GPU,
           "of_warp[threadIdx.x / 32] = ", "of_warp[threadIdx.x % 32] = ", on_gpu(STOCHASTIC)),
    Mutant("the largest magnitude begins with what was in memory", GPU,
           "    cudaMemsetAsync(op.scratch, 0, sizeof(float), stream);\n", "",
           on_gpu(STOCHASTIC)),
    Mutant("32 values have the factor of the first row", GPU,
           "op.factor[place.column + i]", "op.factor[place.column]", on_gpu(FLOOR)),
    Mutant("a warp adds up halves of a row, not neighbours", GPU,
           "UNROLL for (int n = 1; n < 32; n *= 2)\n", "UNROLL for (int n = 16; n > 0; n /= 2)\n",
           on_gpu(ROW_EDEN)),
    Mutant("a gradient's mask is shifted", GPU, "(mask >> i) & 1", "(mask >> (31 - i)) & 1",
           on_gpu(FLOOR)),
    Mutant("the right factor is that of the first column", GPU,
           "left * right[i][0]", "left * right[0][0]", on_gpu(FLOOR)),

    Mutant("a tile has the scale of another packed block", GPU,
           "x.scales[index / 32]", "x.scales[index / 64]", on_gpu(FLOOR)),
    Mutant("both codes of a byte are its lower one", GPU, "(8 * j + 4)", "(8 * j)", on_gpu(FLOOR)),
    Mutant("what is rounded stochastically is not clipped", GPU,
           "u[i][0] = clip(u[i][0], 6);", "u[i][0] = u[i][0];", on_gpu(STOCHASTIC)),
    Mutant("a block at the edge is stored only if its neighbour is inside, too", GPU,
           "block == odd ? inside : other_inside", "inside && other_inside", on_gpu(FLOOR)),
    Mutant("the first two words of a packed block change places", GPU,
           "make_uint4(words[0][0], words[1][0],", "make_uint4(words[1][0], words[0][0],",
           on_gpu(FLOOR)),

    # ---- the ops
    Mutant("any format is packed", BIND, "columns::CAN_PACK || !packs", "true", REFUSED),
    Mutant("a packed matrix is read as it is", BIND,
           "transposed && !columns::IS_SQUARE", "true", REFUSED),
    Mutant("torch is told that a packed operand is not padded", COLUMNS,
           "operand_shapes(x, rows, padded, word", "operand_shapes(x, rows, k, word",
           TESTS + "torch_sees_the_shapes_and_dtypes_that_the_ops_return[QuEST]"),
    Mutant("the definition's scale is 2**-126 at least", QUANTIZERS, "e < -126, 0x400000, bits",
           "e < -126, bits, bits", TESTS + "the_scale_of_a_block_is_one_that_e8m0_has"),
    Mutant("a row of a square block has the scale of its neighbour", QUANTIZERS,
           "scale = scale[:, ::size, None]", "scale = scale.roll(1, 0)[:, ::size, None]",
           TESTS + "a_packed_operand_has_the_values_of_one_that_is_not_packed"),

    Mutant("any number of columns is taken", BIND, "check_matrix(x, 16)", "check_matrix(x, 8)",
           REFUSED),
    Mutant("factors of too few rows are taken", BIND,
           "factor.size(0) == 1 || factor.size(0) == rows", "factor.size(0) <= rows", REFUSED),
    Mutant("missing signs are read", BIND, 'CHECK(t || !needed, name, " is missing");', "",
           REFUSED),
    Mutant("a mask of another shape is read", BIND,
           "check_mask(mask, product, M, K, \"the product\")",
           "check_tensor(mask, \"mask\", 2, ScalarType::Int)",
           TESTS + "a_mask_or_a_product_that_does_not_fit_is_refused_with_a_sentence"),
    Mutant("torch is told that bfloat16 is float32", COLUMNS,
           "x.new_empty(rows, padded, dtype=dtype)",
           "x.new_empty(rows, padded, dtype=torch.float32)",
           TESTS + "torch_sees_the_shapes_and_dtypes_that_the_ops_return"),
    Mutant("square blocks run without a kernel", COLUMNS,
           "found.append((spec.right, is_square))", "found.append((spec.right, False))",
           TESTS + "all_quantisers_of_a_row_are_known_before_it_runs[nvfp4]"),
    Mutant("an own scale rule runs on a kernel", COLUMNS,
           "spec.scale in KERNEL_SCALES and", "True and",
           TESTS + "a_scale_rule_of_ones_own_and_squares_of_mxfp4_have_no_kernel"),
    Mutant("a kernel that did not build is built again for each layer", COLUMNS,
           "        return None\n    return define_ops",
           "        raise SystemExit\n    return define_ops",
           TESTS + "where_a_kernel_does_not_build_a_line_says_why_and_the_definition_runs"),
    Mutant("quantisers are compiled one after another by all processes", BUILD,
           'f"{name}.lock"', '"lock"',
           "tests/test_build.py::test_a_library_does_not_wait_for_another_one"),
    Mutant("the kernel of floor has no multiplier", ARITHMETIC,
           "quest[w] * MULTIPLIER", "quest[w]", on_cpu(FLOOR + "_times_0_84")),
    Mutant("a name says nothing of the multiplier", BUILD,
           "    if spec.multiplier != 1:", "    if False:",
           TESTS + "a_layer_on_kernels_has_the_bytes_of_one_without[multiplied-dtype0]"),
    Mutant("the definition of floor has no multiplier", QUANTIZERS,
           "floor_log2(multiplier * quest_scale(blocks))", "floor_log2(quest_scale(blocks))",
           "tests/test_baselines.py::test_an_axis_changes_a_row_as_it_says[fp4-multiplier-0.84]"),
    Mutant("a name says nothing of the rotation", BUILD,
           "(spec.format, spec.scale, spec.rotation, spec.signs, spec.rounding)",
           "(spec.format, spec.scale, spec.signs, spec.rounding)",
           TESTS + "a_layer_on_kernels_has_the_bytes_of_one_without"),
    Mutant("no kernel is used", COLUMNS,
           "    for spec, square in quantizers_of(recipe):", "    for spec, square in ():",
           TESTS + "a_layer_on_kernels_has_the_bytes_of_one_without"),

    # ---- products of packed operands
    Mutant("one of two constant factors is left out", MATMUL,
           "shape, constant_factors(spec), dtype)", "shape, constant_factor(spec), dtype)",
           PRODUCT + "[fp4-bwd]"),
    Mutant("the right operand's constant factor is that of the left one", MATMUL,
           "constant_factor(spec.left) * constant_factor(spec.right)",
           "constant_factor(spec.left) ** 2", TILES + "[mse-floor]"),
    Mutant("a left operand is asked for as a right one", MATMUL,
           'left._replace(operand_format="fp8_left")', 'left._replace(operand_format="fp8_right")',
           TILES + "[fp4-pma]"),
    Mutant("an operand that no kernel writes is to be in tiles", MATMUL,
           "operand.packs and columns.is_compiled(operand.spec)", "operand.packs",
           TILES + "[fp4-pma]"),
    Mutant("the product takes a rotation out that is not Quartet's", MATMUL,
           "self.spec.rotation == 32 and", "self.spec.rotation and", TILES + "[rotation-128]"),
    Mutant("the product in tiles forgets 3/4 of one operand", MATMUL,
           "mask, constant_factors(spec), dtype)", "mask, constant_factor(spec), dtype)",
           TILES + "[fp4-pma]"),
    Mutant("where nothing has clipped everything has", "fp4/ops.py",
           "(rows, columns // 32), -1,", "(rows, columns // 32), 0,", TILES + "[absmax]"),
    Mutant("a gradient has as many rows as its other operand", MATMUL,
           "recipe.wgrad, dy.shape[1], torch.float32", "recipe.wgrad, len(dy), torch.float32",
           TILES + "[eden-in-all]"),
    Mutant("a half of a tile is written to the next one", GPU,
           "int64_t(blockIdx.x / 2) * gridDim.y", "int64_t(blockIdx.x) * gridDim.y", TILES_ON_GPU),
    Mutant("both halves of a tile are the same rows", GPU,
           "blockIdx.x % 2 * TILE_ROWS + place.tile_row", "place.tile_row", TILES_ON_GPU),
    Mutant("the last tile lacks its second half", GPU,
           "    grid.x += grid.x % 2; ", "    grid.x += 0; ", TILES_ON_GPU),
    Mutant("the factors of rows are left out of a packed product", MATMUL,
           "return cast(product * factor, dtype)", "return cast(product, dtype)",
           PRODUCT + "[eden-in-all]"),
    Mutant("what is packed along another axis is multiplied", RECIPES,
           '== "mxfp4" and self.rhs != "reuse"', '== "mxfp4"', PRODUCT + "[nvfp4-in-mxfp4]"),
    Mutant("a product of MXFP8 and MXFP4 is packed", RECIPES,
           'self.left.format == self.right.format == "mxfp4"', 'self.right.format == "mxfp4"',
           PRODUCT + "[mxfp8-mxfp4]"),
    Mutant("w in squares has no quantiser that takes dw out of its basis", COLUMNS,
           "if is_square and has_basis(spec.right):", "if False:",
           TESTS + "all_quantisers_of_a_row_are_known_before_it_runs[squares-of-another-rule]"),
    Mutant("codes are read as values", MATMUL,
           "ops.dequantize(self.packed, dtype) if self.is_packed else self.values", "self.values",
           PRODUCT + "[nvfp4-in-mxfp4]"),
    Mutant("nothing is packed", MATMUL, "if operand.packs:", "if False:",
           TESTS + "what_a_packed_product_leaves_for_the_backward_pass_is_packed"),
    Mutant("quantisers are not loaded where there is a backend", "fp4/emulate/__init__.py",
           "if not row.has_kernels:", "if not row.has_kernels and backend is None:", LOADED),
    Mutant("packed products run without kernels", "fp4/emulate/__init__.py",
           "any(row.has_packed_products for", "any(row.has_kernels for", LOADED),
]
