"""Faults in what a sharded model sends, and the tests that notice them.

Each takes about ten seconds, since processes are started; the compiled ones take thirty.
"""
from tools.mutants import Mutant

SHARDED = "fp4/sharded.py"
STORED = "fp4/stored_weight.py"
WHOLE = "fp4/whole_model.py"
IN_SHARDED = "tests/test_sharded.py::test_"
GATHERED = IN_SHARDED + "what_is_gathered_is_byte_for_byte_the_quantised_whole_weight"
TRAFFIC = IN_SHARDED + "so_many_bytes_travel_as_the_table_says"
SAME_DATA = IN_SHARDED + "with_the_same_data_everywhere_the_gradients_are_those_of_the_whole_model"
STEP = IN_SHARDED + "a_step_is_one_with_the_mean_gradient_of_all_processes"
CHANGES = IN_SHARDED + "a_changed_weight_is_not_stale"
MICROBATCHES = IN_SHARDED + "microbatches_of_a_step_add_up"
MISTAKES = IN_SHARDED + "what_cannot_be_right_is_said_in_all_processes[2-mistakes:fp4:float32]"
RENEWALS = IN_SHARDED + "a_weight_is_quantised_once_a_step"
POISON = IN_SHARDED + "what_is_not_finite_in_one_process_arrives_in_all"
FREED = IN_SHARDED + "a_block_gives_up_its_whole_weights_after_each_pass"
ORDERS = IN_SHARDED + "evaluations_and_passes_in_another_order_are_those_of_the_whole_model"
LAYERS = IN_SHARDED + "a_block_may_be_nothing_but_layers_and_two_may_share_a_weight"
COMPILED = IN_SHARDED + "compiled_blocks_compute_what_eager_ones_do"
FP8_PRODUCT = (IN_SHARDED + "an_fp8_product_reads_a_weight_that_is_quantised_already_and_not_the"
               "_other")

MUTANTS = [
    # ---- who travels how
    Mutant("FSDP2 does not see the strips, so that float32 travels", SHARDED,
           "self.rows = self.parameter._local_tensor",
           "self.rows = self.parameter.detach().to_local()", TRAFFIC + "[2-traffic:fp4:float32]"),
    Mutant("only the whole model is gathered, and not each block", SHARDED,
           "fully_shard(block, mesh=mesh, reshard_after_forward=not block.keeps_gathered)", "pass",
           TRAFFIC + "[2-traffic:bf16:float32]"),
    Mutant("strips of unequal size are quantised, too", SHARDED,
           "owners[layer.weight] == 1 and layer.weight.shape[0] % n_processes == 0",
           "owners[layer.weight] == 1",
           SAME_DATA + "[3-same_data:fp8:bfloat16]"),
    Mutant("one of two layers that share a weight reads the placeholder", SHARDED,
           "owners[layer.weight] == 1 and layer", "layer",
           LAYERS + "[2-blocks_of_layers:fp4:float32]"),
    Mutant("FP8 travels as FP8, which gloo refuses", SHARDED,
           "self.keep(fp8_strip.values.view(torch.uint8)) ", "self.keep(fp8_strip.values) ",
           LAYERS + "[2-blocks_of_layers:fp8:bfloat16]"),
    Mutant("a single process quantises its strips", SHARDED,
           "    if n_processes == 1:\n", "    if n_processes == 0:\n",
           SAME_DATA + "[1-same_data:fp4:float32]"),
    Mutant("fp8 travels in float32", SHARDED,
           '"FP8 values": Float8Strip', '"FP8 values": None',
           TRAFFIC + "[2-traffic:fp8:float32]"),
    Mutant("an emulated recipe gets a weight rounded to bfloat16", SHARDED,
           '"float32": None', '"float32": CastStrip',
           GATHERED + "[2-gathered:nvfp4:bfloat16]"),
    Mutant("an unquantised weight travels in float32", SHARDED,
           "def to_send(self): return (self.rows.to(self.dtype),)\n\n"
           "    def received(self, whole): return whole",
           "def to_send(self): return (self.rows,)\n\n"
           "    def received(self, whole): return whole.to(self.dtype)",
           TRAFFIC + "[2-traffic:bf16:bfloat16]"),
    Mutant("embedding and head travel in float32", SHARDED,
           "    @torch.no_grad()\n    def after",
           "    def to_send(self): return (self.rows,)\n\n    @torch.no_grad()\n    def after",
           TRAFFIC + "[2-traffic:bf16:bfloat16]"),
    Mutant("the head is not renewed", SHARDED,
           "            out.copy_(arrived[0])\n", "            pass\n",
           GATHERED + "[2-gathered:bf16:bfloat16]"),
    Mutant("the renewal of the head asks for a gradient", SHARDED,
           "    @torch.no_grad()\n    def after", "    def after",
           GATHERED + "[2-gathered:bf16:bfloat16]"),
    Mutant("the memory of embedding and head is kept", SHARDED,
           "return whole, (whole,)", "return whole.clone(), (whole,)",
           FREED + "[2-freed:bf16:bfloat16]"),

    # ---- what was quantised
    Mutant("the strips have the scale of another word", SHARDED,
           "self.rows, self.layer.recipe.forward_scale)",
           'self.rows, {"floor": "nearest", "nearest": "floor"}'
           "[self.layer.recipe.forward_scale])", GATHERED + "[2-gathered:fp4:float32]"),
    Mutant("the mask says that nothing was clipped", SHARDED,
           "self.keep(*packed, mask)", "self.keep(*packed, mask | -1)",
           GATHERED + "[2-gathered:fp4-sr:bfloat16]"),
    Mutant("each strip of fp8 has its own scale", SHARDED,
           "    dist.all_reduce(largest, dist.ReduceOp.MAX)\n", "",
           GATHERED + "[2-gathered:fp8:float32]"),
    Mutant("the strips of fp8 have each other's scales", SHARDED,
           "zip(float8, largest_of_whole(float8))", "zip(float8, largest_of_whole(float8).flip(0))",
           GATHERED + "[2-gathered:fp8:float32]"),
    Mutant("the largest value of a strip is not a magnitude", SHARDED,
           "strip.rows.abs().amax()", "strip.rows.amax()",
           GATHERED + "[4-gathered:fp8:bfloat16]"),
    Mutant("the largest value leaves out what is NaN", SHARDED,
           "largest.isnan(), torch.inf, largest)", "largest.isnan(), 1., largest)",
           POISON + "[2-poison:fp8:bfloat16]"),

    # ---- once a step, and after each change
    Mutant("a strip is quantised once and for all", SHARDED,
           "if self.source != self.current_source():", "if self.source is None:",
           CHANGES + "[2-changes:fp4:float32]"),
    Mutant("a strip is quantised in each pass", SHARDED,
           "if self.source != self.current_source():", "if True:",
           RENEWALS + "[2-renewals:fp4:float32]"),
    Mutant("changes of the parameter are not seen", SHARDED,
           "source_of(self.rows), self.parameter._version", "source_of(self.rows), 0",
           CHANGES + "[2-changes:fp4:float32]"),
    Mutant("changes of the strip itself are not seen", SHARDED,
           "stored_weight.source_of(self.rows), self.parameter._version",
           "0, self.parameter._version",
           CHANGES + "[2-changes:fp8:bfloat16]"),
    Mutant("a strip of fp8 is renewed with the old scale", SHARDED,
           "        self.scale = fp8_strip.scale\n",
           '        self.scale = getattr(self, "scale", fp8_strip.scale)\n',
           CHANGES + "[2-changes:fp8:bfloat16]"),
    Mutant("the step of foreach is not counted", STORED,
           'if group.get("fused") or is_sharded(parameter):', 'if group.get("fused"):',
           CHANGES + "[2-changes:fp4:float32]"),
    Mutant("quantize_weights leaves the strips out", WHOLE,
           "        renew_strips(strips)\n", "        pass\n",
           RENEWALS + "[2-renewals:fp4-fwd:bfloat16]"),
    Mutant("what was gathered is kept when the step is over", WHOLE,
           "set_reshard_after_backward(is_last,", "set_reshard_after_backward(False,",
           MICROBATCHES + "[2-microbatches:fp4:float32]"),
    Mutant("quantised weights travel again in each microbatch", WHOLE,
           "set_reshard_after_backward(is_last,", "set_reshard_after_backward(True,",
           TRAFFIC + "[2-traffic:fp4:float32]"),
    Mutant("quantised weights travel again for the backward pass", SHARDED,
           ", reshard_after_forward=not block.keeps_gathered)", ")",
           TRAFFIC + "[2-traffic:fp8:float32]"),
    Mutant("whole weights in BF16 are kept, too", SHARDED,
           "in (PackedStrip, Float8Strip) for", "is not None for",
           FREED + "[2-freed:bf16:bfloat16]"),
    Mutant("check_weights leaves the strips out", WHOLE,
           "check_same(layer.strip.is_right(), name)", "pass", MISTAKES),
    Mutant("one process alone hears that a strip is stale", SHARDED,
           "        dist.all_reduce(n_wrong)\n", "", MISTAKES),
    Mutant("a layer that is called by itself reads memory that is freed", STORED,
           "layer.gathered is None or not is_sharded(layer.weight)", "True", MISTAKES),
    Mutant("only the strips of FP4 are renewed", SHARDED,
           "    if float8:\n", "    if False:\n", RENEWALS + "[2-renewals:fp8:bfloat16]"),
    Mutant("quantize_weights quantises strips as whole weights", WHOLE,
           "and not stored_weight.is_sharded(layer.weight):", ":",
           RENEWALS + "[2-renewals:fp4:float32]"),

    Mutant("an evaluation leaves embedding and head whole, and blind to the next change", SHARDED,
           "    model.register_forward_hook(reshard_after_evaluation)\n", "",
           CHANGES + "[2-changes:nvfp4:float32]"),
    Mutant("embedding and head are given up before the backward pass", SHARDED,
           "    if not torch.is_grad_enabled():\n", "    if True:\n",
           TRAFFIC + "[2-traffic:bf16:float32]"),

    # ---- memory, and who reads what
    Mutant("each layer has a placeholder of its own", SHARDED,
           "return self.placeholder[:N * K].view(N, K), ()", "return torch.empty(N, K), ()",
           FREED + "[2-freed:fp4:float32]"),
    Mutant("the placeholder is as large as all weights", SHARDED,
           "torch.empty(max(sizes, default=0), device=device)",
           "torch.empty(sum(sizes), device=device)", FREED + "[2-freed:fp8:bfloat16]"),
    Mutant("what was gathered is kept in a copy", SHARDED,
           "def received(self, whole): return whole", "def received(self, whole): return whole + 0",
           FREED + "[2-freed:bf16:bfloat16]"),
    Mutant("compiled code renews what was gathered from the placeholder", SHARDED,
           "is_stored=False", "is_stored=True", COMPILED + "[2-compiled:fp4:float32]"),
    Mutant("an unquantised product reads the placeholder", STORED,
           "    if layer.gathered is None:\n", "    if True:\n",
           IN_SHARDED + "a_gathered_weight_hands_its_gradient_to_the_float32_weight"),
    Mutant("a gathered weight gets no gradient", STORED,
           "return dw.float(), None", "return 0 * dw.float(), None",
           STEP + "[2-step:bf16:bfloat16]"),
    Mutant("a product on the kernels reads the placeholder", "fp4/linear.py",
           "w_quantized = self.gathered or stored_weight.operand(",
           "w_quantized = stored_weight.operand(", SAME_DATA + "[2-same_data:fp4:float32]"),
    Mutant("an fp8 product reads the placeholder", "fp4/linear.py",
           "self.recipe, self.gathered, self.backend)", "self.recipe, None, self.backend)",
           ORDERS + "[2-orders:fp8:bfloat16]"),
    Mutant("what is ready is not read", "fp4/emulate/matmul.py",
           "w if w_ready is None else w_ready", "w", FP8_PRODUCT),
    Mutant("an FP8 weight that is ready is quantised again", "fp4/emulate/fp8.py",
           "w_fp8 = w if isinstance(w, Scaled) else quantize(w, E4M3)",
           "w_fp8 = quantize(w.values.float() if isinstance(w, Scaled) else w, E4M3)", FP8_PRODUCT),
    Mutant("a part of an FP8 weight has its own scale", "fp4/emulate/fp8.py",
           "    if largest is None:\n", "    if True:\n",
           IN_SHARDED + "a_part_is_quantised_to_fp8_as_a_part_of_the_whole"),
]
