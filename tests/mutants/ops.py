"""Faults in the ops, in what chooses a product, and in what builds the kernels, and the tests that
notice them.

Each takes about three seconds, and ten where a tiny library is compiled.
"""
from tools.mutants import Mutant

OPS = "fp4/ops.py"
BACKEND = "fp4/backend.py"
BUILD = "fp4/build.py"
TOOLCHAIN = "fp4/toolchain.py"
IN_OPS = "tests/test_ops.py::"
IN_KERNELS = "tests/test_kernels.py::"
IN_BACKEND = "tests/test_backend.py::"
IN_BLACKWELL = "tests/test_blackwell.py::"
IN_BUILD = "tests/test_build.py::"
SHAPES = IN_OPS + "test_torch_compile_is_told_the_shapes_and_dtypes_that_come_out"
TILES = IN_OPS + "test_torch_compile_is_told_the_shapes_of_the_operands_in_tiles"
SAME = IN_OPS + "test_the_kernels_and_the_definition_read_the_same_numbers"
WORDS = IN_OPS + "test_a_word_that_no_list_has_is_refused_with_those_that_it_has"
NUMBERS = IN_OPS + "test_a_number_without_a_word_is_an_error_not_a_wrong_result"
SIZES = IN_KERNELS + "test_blocks_of_every_size_are_quantised_as_the_definition_says"
BYTES = (IN_KERNELS + "test_every_scale_byte_is_unpacked_requantised_and_multiplied_as_the"
         "_definition_says")
FUSED = IN_OPS + "test_a_fused_op_is_the_two_ops_that_it_stands_for"
ALPHA = IN_OPS + "test_the_product_of_packed_matrices_is_that_of_their_values_times_alpha"
DRAW = ("tests/test_reference.py::"
        "test_each_bit_of_the_signs_and_the_seeds_is_drawn_and_no_two_draws_agree")

MUTANTS = [
    # ---- words and numbers
    Mutant("the words of a scale are in the wrong order", OPS,
           'SCALES = ("floor", "nearest")', 'SCALES = ("nearest", "floor")', SIZES),
    Mutant("the sign orders have another order than the enum", OPS,
           'SIGN_ORDERS = ("before", "after", "none")',
           'SIGN_ORDERS = ("after", "before", "none")',
           IN_OPS + "test_the_words_of_the_ops_are_the_enums_of_the_kernels_in_the_same_order"),
    Mutant("the formats have another order than the enum", OPS,
           'OPERAND_FORMATS = ("packed", "mxf4", "fp8")',
           'OPERAND_FORMATS = ("packed", "fp8", "mxf4")',
           IN_OPS + "test_the_words_of_the_ops_are_the_enums_of_the_kernels_in_the_same_order"),
    Mutant("a number of -1 is the last word", OPS,
           "check(0 <= number < len(words)", "check(number < len(words)", NUMBERS),
    Mutant("an unknown word is the first one", OPS,
           "    return words.index(word)", "    return words.index(word) if word in words else 0",
           survives="check, in the line above, has refused the word"),
    Mutant("an unknown word is not refused", OPS,
           "    check(word in words, f\"{word!r} is not one of {', '.join(words)}\")\n"
           "    return words.index(word)",
           "    return words.index(word) if word in words else 0", WORDS),

    # ---- quantize_forward
    Mutant("quantize_forward tells a mask of int64", OPS,
           "x.shape[1] // 32, dtype=torch.int32)", "x.shape[1] // 32, dtype=torch.int64)", SHAPES),
    Mutant("quantize_forward tells codes of a byte each", OPS,
           "like.new_empty(rows, columns // 2, dtype", "like.new_empty(rows, columns, dtype",
           SHAPES),
    Mutant("quantize_forward returns the scales first", OPS,
           "codes, scales, mask = torch.ops.fp4.quantize_forward(x, number_of(scale, SCALES))\n",
           "scales, codes, mask = torch.ops.fp4.quantize_forward(x, number_of(scale, SCALES))\n",
           SIZES),
    Mutant("quantize_forward forgets its scale", OPS,
           "torch.ops.fp4.quantize_forward(x, number_of(scale, SCALES))",
           "torch.ops.fp4.quantize_forward(x, 0 * number_of(scale, SCALES))", SIZES),

    # ---- quantize_backward
    Mutant("quantize_backward swaps the two sign orders", OPS,
           "number_of(sign_order, SIGN_ORDERS),\n        number_of(sign_order_t, SIGN_ORDERS)",
           "number_of(sign_order_t, SIGN_ORDERS),\n        number_of(sign_order, SIGN_ORDERS)",
           SIZES),
    Mutant("quantize_backward's definition swaps the two sign orders", OPS,
           "word_of(sign_order, SIGN_ORDERS),\n        word_of(sign_order_t, SIGN_ORDERS)",
           "word_of(sign_order_t, SIGN_ORDERS),\n        word_of(sign_order, SIGN_ORDERS)", SAME),
    Mutant("quantize_backward returns x.T first", OPS,
           "return Packed(values, scales), Packed(values_t, scales_t)",
           "return Packed(values_t, scales_t), Packed(values, scales)", SIZES),
    Mutant("quantize_backward tells a transpose without padding", OPS,
           "operand_shapes(x, columns, pad_to_32(rows), operand_format)",
           "operand_shapes(x, columns, rows, operand_format)", SHAPES),
    Mutant("quantize_backward tells a right operand", OPS,
           "transposed = operand_shapes(x, columns, pad_to_32(rows), operand_format)",
           "transposed = operand_shapes(x, columns, pad_to_32(rows), operand_format, True)", TILES),

    # ---- requantize_transposed
    Mutant("requantize_transposed tells a left operand", OPS,
           "operand_format, is_right=True)", "operand_format)", TILES),
    Mutant("requantize_transposed tells half the rows", OPS,
           "rows = 2 * codes.shape[1]", "rows = codes.shape[1]", SHAPES),
    Mutant("requantize_transposed never rounds stochastically", OPS,
           "*packed, signs, seed, stochastic, number_of(sign_order",
           "*packed, signs, seed, False, number_of(sign_order", BYTES),
    Mutant("requantize_transposed's definition never rounds stochastically", OPS,
           "codes, scales, signs, seed, stochastic, word_of(sign_order",
           "codes, scales, signs, seed, False, word_of(sign_order", SAME),

    # ---- tiles
    Mutant("a tile of scales has 256 bytes", OPS,
           "BYTES_PER_SCALE_TILE = 512", "BYTES_PER_SCALE_TILE = 256", TILES),
    Mutant("the tiles of FP8 are counted down before across", OPS,
           "like.new_empty(down, across, TILE_SIDE", "like.new_empty(across, down, TILE_SIDE",
           TILES),
    Mutant("the last tile is left out", OPS,
           "return (size + TILE_SIDE - 1) // TILE_SIDE", "return size // TILE_SIDE", TILES),

    # ---- draw
    Mutant("draw tells int32", OPS,
           "dy.new_empty(1, dtype=torch.int64), dy.new_empty(n",
           "dy.new_empty(1, dtype=torch.int32), dy.new_empty(n", SHAPES),
    Mutant("draw tells n signs", OPS,
           "return dy.new_empty(1, dtype=torch.int64)", "return dy.new_empty(n, dtype=torch.int64)",
           SHAPES),
    Mutant("draw gives the seeds of the signs", OPS,
           "    return torch.ops.fp4.draw(dy, x, n)",
           "    signs, seeds = torch.ops.fp4.draw(dy, x, n)\n    return signs, signs.expand(n)",
           DRAW),
    Mutant("draw is not tagged as random", OPS,
           "reference.draw, tags=torch.Tag.nondeterministic_seeded)", "reference.draw)",
           survives="torch 2.13 merges two equal calls in spite of the tag; what keeps the calls of"
                    " two layers apart is the argument x"),

    # ---- dequantize, gemm, unrotate
    Mutant("dequantize tells as many columns as bytes", OPS,
           "codes.new_empty(codes.shape[0], 2 * codes.shape[1], dtype",
           "codes.new_empty(codes.shape[0], codes.shape[1], dtype", SHAPES),
    Mutant("dequantize tells float32 always", OPS,
           "2 * codes.shape[1], dtype=dtype)", "2 * codes.shape[1], dtype=torch.float32)", SHAPES),
    Mutant("dequantize unpacks to BF16 always", OPS,
           "return torch.ops.fp4.dequantize(*packed, dtype)",
           "return torch.ops.fp4.dequantize(*packed, torch.bfloat16)", BYTES),
    Mutant("gemm tells the transpose", OPS,
           "a.new_empty(a.shape[0], b.shape[0], dtype=dtype)",
           "a.new_empty(b.shape[0], a.shape[0], dtype=dtype)", SHAPES),
    Mutant("gemm multiplies b by a", OPS,
           "torch.ops.fp4.gemm(*a, *b, alpha, dtype)\n\n\n@op(\"unrotate",
           "torch.ops.fp4.gemm(*b, *a, alpha, dtype)\n\n\n@op(\"unrotate",
           IN_KERNELS + "test_a_product_is_within_the_error_of_an_fp32_sum_and_one_rounding"),
    Mutant("gemm forgets alpha", OPS,
           "torch.ops.fp4.gemm(*a, *b, alpha, dtype)\n\n\n@op(\"unrotate",
           "torch.ops.fp4.gemm(*a, *b, 1.0, dtype)\n\n\n@op(\"unrotate",
           IN_KERNELS + "test_a_product_is_within_the_error_of_an_fp32_sum_and_one_rounding"),
    Mutant("unrotate tells the dtype of d", OPS,
           "d.new_empty(d.shape, dtype=dtype)", "d.new_empty(d.shape)", SHAPES),
    Mutant("unrotate tells the shape of the mask", OPS,
           "d.new_empty(d.shape, dtype=dtype)", "d.new_empty(mask.shape, dtype=dtype)", SHAPES),
    Mutant("unrotate keeps what was clipped", OPS,
           "return torch.ops.fp4.unrotate(d, mask, dtype)\n\n\n#",
           "return torch.ops.fp4.unrotate(d, ~mask, dtype)\n\n\n#",
           IN_KERNELS + "test_each_op_gives_the_bytes_of_the_definition"
           "[33x160-normal-float32-cpu]"),

    # ---- the ops that do two things
    Mutant("quantize_gemm tells float32", OPS,
           "y = x.new_empty(x.shape[0], b.shape[0])",
           "y = x.new_empty(x.shape[0], b.shape[0], dtype=torch.float32)", SHAPES),
    Mutant("quantize_gemm quantises with floor", OPS,
           "torch.ops.fp4.quantize_gemm(x, number_of(scale, SCALES), *b)",
           "torch.ops.fp4.quantize_gemm(x, 0, *b)", FUSED),
    Mutant("quantize_gemm multiplies by 16/9", OPS,
           "torch.ops.fp4.gemm(codes, scales, b, b_scales, 1.0, x.dtype)",
           "torch.ops.fp4.gemm(codes, scales, b, b_scales, 16 / 9, x.dtype)", FUSED),
    Mutant("gemm_unrotate tells the mask's shape", OPS,
           "a.new_empty(mask.shape[0], 32 * mask.shape[1], dtype",
           "a.new_empty(mask.shape[0], mask.shape[1], dtype", SHAPES),
    Mutant("gemm_unrotate rounds the product to BF16 before it is rotated", OPS,
           "d = torch.ops.fp4.gemm(a, a_scales, b, b_scales, alpha, torch.float32)",
           "d = torch.ops.fp4.gemm(a, a_scales, b, b_scales, alpha, torch.bfloat16)",
           IN_KERNELS + "test_a_gradients_product_is_masked_and_rotated_back"),
    Mutant("gemm_unrotate does not mask", OPS,
           "return torch.ops.fp4.unrotate(d, mask, dtype)\n\n\n@op",
           "return torch.ops.fp4.unrotate(d, mask | -1, dtype)\n\n\n@op", FUSED),
    Mutant("gemm_unrotate forgets alpha", OPS,
           "torch.ops.fp4.gemm_unrotate(*a, *b, mask, alpha, dtype)",
           "torch.ops.fp4.gemm_unrotate(*a, *b, mask, 1.0, dtype)", FUSED),
    Mutant("an op takes a word, whose memory is lost in each call", OPS,
           "draw(Tensor dy, Tensor x, int n) -> (",
           "draw(Tensor dy, Tensor x, int n, str s='') -> (",
           IN_OPS + "test_no_op_takes_or_returns_a_string"),

    # ---- which product runs
    Mutant("Hopper's usual product is the library's", BACKEND,
           "if capability == HOPPER:\n        return \"own\"",
           "if capability == HOPPER:\n        return \"fp8\"",
           IN_BACKEND + "test_auto_is_the_usual_product_of_the_gpu"),
    Mutant("an RTX 30 is asked for FP8", BACKEND,
           "if capability >= (8, 9):", "if capability >= (8, 6):",
           IN_BACKEND + "test_auto_is_the_usual_product_of_the_gpu"),
    Mutant("FP8 is promised to every Ampere", BACKEND,
           'capability >= (8, 9)),\n        "bf16"', 'capability >= (8, 0)),\n        "bf16"',
           IN_BACKEND + "test_a_product_that_the_gpu_does_not_have_is_refused_in_a_sentence"),
    Mutant("Hopper's kernels are compiled without its own instructions", BACKEND,
           'suffix = "" if operand_format == "packed" else "a"', 'suffix = ""',
           IN_BACKEND + "test_every_product_can_be_compiled_for_its_gpu"),
    Mutant("Blackwell's quantisers write FP8 tiles", BACKEND,
           '"mxf4", sources=', '"fp8", sources=',
           IN_BACKEND + "test_each_gpu_is_given_its_product"),
    Mutant("the consumer Blackwell has the other one's kernel", BACKEND,
           '{10: "gemm_sm100", 12: "gemm_sm120"}', '{10: "gemm_sm100", 12: "gemm_sm100"}',
           IN_BACKEND + "test_each_gpu_is_given_its_product"),
    Mutant("operands on the CPU have the GPU's format", BACKEND,
           'return self.operand_format if tensor.is_cuda else "packed"',
           "return self.operand_format",
           IN_BACKEND + "test_only_what_lies_on_a_gpu_has_its_format"),
    Mutant("the library's FP8 product loses alpha in BF16", BACKEND,
           "torch.ops.fp4.packed_to_fp8(a, a_scales, alpha)",
           "torch.ops.fp4.packed_to_fp8(a, a_scales, 1.0)",
           IN_BACKEND + "test_a_product_of_the_library_is_the_one_of_the_definition"),
    Mutant("the library's FP8 product keeps the rows of zeros", BACKEND,
           "out.mul_(a_scales).mul_(b_scales)\n    return out[:, :columns].contiguous()",
           "out.mul_(a_scales).mul_(b_scales)\n    return out.contiguous()",
           IN_BACKEND + "test_a_product_of_the_library_is_the_one_of_the_definition"),
    Mutant("the library's BF16 product rounds before alpha", BACKEND,
           "(alpha * torch.mm(a, b.T, out_dtype=torch.float32)).to(dtype)",
           "alpha * torch.mm(a, b.T, out_dtype=torch.float32).to(dtype)",
           IN_BACKEND + "test_a_product_of_the_library_is_the_one_of_the_definition"),
    Mutant("the FP8 product may accumulate coarsely", BACKEND,
           "a_scales, b_scales, out_dtype=dtype, use_fast_accum=False)",
           "a_scales, b_scales, out_dtype=dtype, use_fast_accum=True)",
           IN_BACKEND + "test_a_product_of_the_library_is_the_one_of_the_definition"),
    Mutant("NVFP4's scales are an octave too low", BACKEND,
           "(alpha * pow2(largest - 127) * 2 ** -8).float()",
           "(alpha * pow2(largest - 127) * 2 ** -9).float()",
           IN_BLACKWELL + "test_an_mxfp4_matrix_is_an_nvfp4_matrix_over_18_octaves"),
    Mutant("NVFP4's tensor scale counts blocks of zeros", BACKEND,
           "torch.where(is_zero | is_nan, 0, scales)", "torch.where(is_nan, 0, scales)",
           IN_BLACKWELL + "test_an_mxfp4_matrix_is_an_nvfp4_matrix_over_18_octaves"),
    Mutant("NVFP4's scales hide a NaN", BACKEND,
           "torch.where(is_nan, torch.nan, pow2(exponents))", "pow2(exponents)",
           IN_BLACKWELL + "test_an_mxfp4_matrix_is_an_nvfp4_matrix_over_18_octaves"),
    Mutant("Blackwell's scales are in tiles of another order", BACKEND,
           "tiles.permute(0, 3, 2, 1, 4)", "tiles.permute(0, 3, 1, 2, 4)",
           IN_BLACKWELL + "test_the_kernels_place_of_a_scale_is_the_one_of_the_permutation"),

    # ---- building
    Mutant("a library that was cut off counts as whole", BUILD,
           "return Path(library + CHECKSUM).read_bytes() == checksum(library)",
           "return bool(Path(library + CHECKSUM).read_bytes())",
           IN_BUILD + "test_a_damaged_library_is_made_once_more"),
    Mutant("the library does not depend on its headers", BUILD,
           'SOURCE_SUFFIXES = (".cpp", ".cu", ".cuh", ".h")',
           'SOURCE_SUFFIXES = (".cpp", ".cu")',
           IN_BUILD + "test_a_change_of_a_source_or_a_header_makes_another_library"),
    Mutant("the library of another processor is loaded", BUILD,
           "processor_features())\n    digest", "0)\n    digest",
           IN_BUILD + "test_another_machine_gets_another_library"),
    Mutant("the flags of the linker make no other library", BUILD,
           "toolchain.NVCC_FLAGS, toolchain.LINK_FLAGS,", "toolchain.NVCC_FLAGS,",
           IN_BUILD + "test_other_flags_of_a_compiler_make_another_library"),
    Mutant("a second process compiles again what it waited for", BUILD,
           "        if not is_whole(library):       # Another", "        if True:       # Another",
           IN_BUILD + "test_of_two_processes_at_once_one_compiles_and_both_get_the_library"),
    Mutant("a second gemm is taken for the first", BUILD,
           "check(gemm in loaded, f\"gemm", "check(True, f\"gemm",
           IN_BUILD + "test_a_second_gemm_is_refused_in_a_sentence"),
    Mutant("what a killed build left stops the next one", BUILD,
           "    if os.path.isdir(folder):\n        shutil.rmtree(folder)\n    os.makedirs(folder)",
           "    os.makedirs(folder, exist_ok=True)",
           IN_BUILD + "test_what_a_killed_build_leaves_does_not_stop_the_next"),
    Mutant("a compiler's own line is not told", BUILD,
           '"reference.py, which is slow, because the kernels did not build: "\n'
           "                       + lines[0]",
           '"reference.py, which is slow, because the kernels did not build: "\n'
           "                       + lines[-1][:0]",
           IN_BUILD + "test_when_the_kernels_do_not_compile_one_line_says_where_and_why"),
    Mutant("the checksum is written before the library is there", BUILD,
           "            compile_library(os.path.dirname(library), sources, flags, target)\n",
           "            compile_library(os.path.dirname(library), sources, flags, target)\n"
           "            library += ''\n            Path(library).chmod(0o755)\n"
           "            Path(library + CHECKSUM).touch()\n            return library\n",
           IN_BUILD + "test_a_library_is_compiled_once_and_it_is_said_that_this_takes_a_while"),
    Mutant("an nvcc of another CUDA is taken", TOOLCHAIN,
           "if cuda is None or major(release(path)) == major(cuda):", "if True:",
           IN_BUILD + "test_an_nvcc_of_another_cuda_is_passed_over"),
    Mutant("packages are asked for, for CUDA 12 as well", TOOLCHAIN,
           "FIRST_CUDA_WITH_WHEELS = 13", "FIRST_CUDA_WITH_WHEELS = 12",
           IN_BUILD + "test_an_nvcc_that_cannot_be_found_is_one_sentence_with_the_remedy"),
    Mutant("ninja beside Python is not found", TOOLCHAIN,
           'os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable), folder]',
           'os.environ.get("PATH", os.defpath), folder]',
           IN_BUILD + "test_ninja_is_found_beside_python"),
    Mutant("a compiler of two words is one program", TOOLCHAIN,
           "if len(cxx.split()) > 1: ", "if False: ",
           IN_BUILD + "test_a_compiler_behind_ccache_works"),
    Mutant("a bad argument is let pass", "fp4/check.py", "if not condition:", "if False:", NUMBERS),
    Mutant("a bad argument is an assertion, which python -O leaves out", "fp4/check.py",
           "raise ValueError(sentence)", "raise AssertionError(sentence)", WORDS),
    Mutant("the sentence of a refusal is lost", "fp4/check.py",
           "raise ValueError(sentence)", "raise ValueError", NUMBERS),
    Mutant("the compiler may fuse a multiplication and an addition",
           TOOLCHAIN, '"-ffp-contract=off"', '"-ffp-contract=fast"',
           survives="g++ 12 then fuses 48 instructions, but over 400,000 blocks at the edges of "
                    "scales not one byte differs"),
]
