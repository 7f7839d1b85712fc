"""Faults in the trainer, and the tests that notice them."""
from tools.mutants import Mutant

TRAIN = "tests/test_train.py::test_"
SURVIVAL = "tests/test_survival.py::test_"
ABLATION = "tests/test_ablation.py::test_"

BY_HAND = TRAIN + "a_run_is_that_of_a_trainer_written_out"
PLAIN = BY_HAND + "[defaults]"
CLIPPED = BY_HAND + "[clipped-and-decaying-in-four-microbatches]"
UNCLIPPED = BY_HAND + "[not-clipped]"
GROUPS = TRAIN + "only_matrices_inside_the_blocks_decay_and_the_papers_values_are_the_defaults"
SCHEDULE = TRAIN + "the_schedule_is_torchs_one_cycle_with_its_peak_after_a_tenth[359]"
LENGTH = TRAIN + "the_length_of_a_run_is_by_the_parameters_without_embedding_and_head"
LENGTH_OF_A_RUN = TRAIN + "a_run_by_tokens_per_parameter_has_the_steps_of_its_blocks"
FIRST_WEIGHTS = TRAIN + "first_weights_depend_on_the_seed_and_on_nothing_else"
PADDED = TRAIN + "the_vocabulary_is_padded_to_a_multiple_of_64"
MICRO = TRAIN + "a_microbatch_is_the_largest_power_of_two_that_divides_the_batch_and_fits"
SPEED = TRAIN + "speed_and_utilisation_of_a_step_are_those_of_its_time"
EVALUATED_TEN_TIMES = TRAIN + ("a_run_is_evaluated_and_saved_ten_times_or_as_asked_and_at_its_end"
                               "[args0-evaluated0]")
EVALUATED = EVALUATED_TEN_TIMES.replace("[args0-evaluated0]", "[args2-evaluated2]")
RUNS = TRAIN + "comma_lists_mean_every_combination_seed_by_seed"
LARGEST = TRAIN + "the_largest_seed_and_the_largest_number_of_runs_are_still_taken"
SETTINGS = TRAIN + "a_checkpoints_settings_hold_but_for_what_was_typed_or_is_the_machines"
KEPT = TRAIN + "blocks_that_are_kept_may_be_all_and_not_more"
COMPILES = TRAIN + "a_gpu_compiles_by_default_and_a_cpu_does_not"
BAD = TRAIN + "a_bad_setting_is_one_sentence_and_writes_nothing"
SET_ASIDE = TRAIN + "an_earlier_run_of_the_same_name_is_set_aside"
NOT_FINITE = TRAIN + "a_loss_that_is_not_finite_stops_with_step_loss_rate_and_checkpoint"
LOG_HEAD = TRAIN + "the_log_says_what_made_it"
BY_NAME = SURVIVAL + "resuming_by_name_alone_takes_the_settings_of_the_checkpoint"
MAY_CHANGE = SURVIVAL + "what_makes_another_run_is_refused_and_what_may_change_is_applied"
PAST_ITS_END = SURVIVAL + "past_its_end_a_run_is_left_alone_with_a_sentence"
NOISE = TRAIN + "each_step_of_each_seed_draws_random_numbers_of_its_own"
RESUMED = SURVIVAL + "a_stopped_run_that_is_resumed_ends_as_if_it_had_not_been_stopped"
DAMAGED = SURVIVAL + "a_damaged_newest_checkpoint_gives_way_to_the_one_before"

CLIP = """\
            norm = processes.number(clip())
"""
CHECK = """\
            is_late = time.monotonic() - saved_at > CHECKPOINT_SECONDS
            loss, is_late = processes.end_of_step(loss, is_late, stop, cfg.device)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                row = run.Step(done, loss, None, lr, norm)
                log.write_row(row)
                diverge(cfg, row, log)
"""
STEP = "            optimizer.step()\n"

MUTANTS = [
    # Optimizer
    Mutant("the norms decay", "quartet.py",
           "model.blocks.parameters() if p.dim() == 2]", "model.blocks.parameters()]", GROUPS),
    Mutant("embedding and head decay", "quartet.py",
           "model.blocks.parameters() if", "model.parameters() if", GROUPS),
    Mutant("the two groups have each other's decay", "quartet.py",
           "decayed = [p for p in model.blocks.parameters() if p.dim() == 2]",
           "decayed = [p for p in model.blocks.parameters() if p.dim() != 2]", GROUPS),
    Mutant("nothing decays by default", "quartet.py",
           "weight_decay: float = flag(0.1,", "weight_decay: float = flag(0.0,", GROUPS),
    Mutant("the gradient is clipped at 10 by default", "quartet.py",
           "clip: float = flag(1.0,", "clip: float = flag(10.0,", GROUPS),
    Mutant("the second beta is 0.999", "quartet.py", "(0.9, 0.95)", "(0.9, 0.999)", PLAIN),
    Mutant("the first beta is 0.95", "quartet.py", "(0.9, 0.95)", "(0.95, 0.95)", PLAIN),
    Mutant("the epsilon is 1e-6", "quartet.py", "eps=1e-8, fused", "eps=1e-6, fused", PLAIN),
    Mutant("decay is a part of the gradient", "quartet.py",
           "torch.optim.AdamW(groups", "torch.optim.Adam(groups", CLIPPED),
    Mutant("the gradient is not clipped", "quartet.py",
           "model.parameters()), cfg.clip or math.inf)", "model.parameters()), math.inf)",
           CLIPPED),
    Mutant("a clip of 0 clips at 1", "quartet.py",
           "cfg.clip or math.inf", "cfg.clip or 1.0", UNCLIPPED),
    Mutant("the gradient is clipped after the step", "quartet.py", CLIP + CHECK + STEP,
           STEP + CLIP + CHECK, CLIPPED),
    Mutant("each value of the gradient is clipped", "quartet.py",
           "norm = processes.number(clip())",
           "parameters = list(model.parameters())\n"
           "            norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf).item()\n"
           "            torch.nn.utils.clip_grad_value_(parameters, cfg.clip or math.inf)",
           CLIPPED),
    Mutant("the logged norm is that of the clipped gradient", "quartet.py",
           "processes.number(clip())",
           "min(processes.number(clip()), cfg.clip or math.inf)", PLAIN),
    Mutant("only the blocks' gradient is clipped", "quartet.py",
           "list(model.parameters()), cfg.clip", "list(model.blocks.parameters()), cfg.clip",
           PLAIN),
    Mutant("gradients of earlier steps stay", "quartet.py",
           "            optimizer.zero_grad(set_to_none=not cfg.replay)\n", "", PLAIN),

    # Schedule
    Mutant("there is no warm-up", "quartet.py", "warmup = steps // 10", "warmup = 0", SCHEDULE),
    Mutant("the warm-up is a hundredth of the run", "quartet.py",
           "warmup = steps // 10", "warmup = steps // 100", SCHEDULE),
    Mutant("the warm-up begins at a tenth of the peak", "quartet.py",
           "lowest = peak / 100", "lowest = peak / 10", SCHEDULE),
    Mutant("the rate falls to 0", "quartet.py", "lowest = peak / 10\n", "lowest = 0\n", SCHEDULE),
    Mutant("the rate falls along a line", "quartet.py",
           "(1 + math.cos(math.pi * distance)) / 2", "(1 - distance)", SCHEDULE),
    Mutant("the last step is one before the end of the schedule", "quartet.py",
           "max(1, steps - 1 - warmup)", "max(1, steps - warmup)", SCHEDULE),
    Mutant("the first group keeps its rate", "quartet.py",
           "for group in optimizer.param_groups:", "for group in optimizer.param_groups[1:]:",
           PLAIN),
    Mutant("the rate is that of the next step", "quartet.py",
           "lr = lr_at(step, steps, cfg.lr)", "lr = lr_at(step + 1, steps, cfg.lr)", PLAIN),
    Mutant("the rate of the command line is not used", "quartet.py",
           "lr=settings.lr or preset.lr", "lr=preset.lr", GROUPS),

    # Batches and microbatches
    Mutant("the gradients of microbatches add up without weights", "tools/cuda_graph.py",
           "loss = model(x, y) / n_micro\n        loss.backward()\n        return loss.detach()",
           "loss = model(x, y)\n        loss.backward()\n        return loss.detach() / n_micro",
           CLIPPED),
    Mutant("the logged loss is that of the last microbatch", "quartet.py",
           "loss += accumulate(x, y)", "loss = accumulate(x, y) * n_micro", CLIPPED),
    Mutant("a batch is its first microbatch, several times", "quartet.py",
           "tokens.batch(corpus.train, i,", "tokens.batch(corpus.train, step * n_micro,", CLIPPED),
    Mutant("every step has the first batch", "quartet.py",
           "tokens.batch(corpus.train, i,", "tokens.batch(corpus.train, i % n_micro,", PLAIN),
    Mutant("the last microbatch is left out", "quartet.py",
           "done * n_micro))", "done * n_micro - (n_micro > 1)))", CLIPPED),
    Mutant("the order of the data does not depend on the seed", "quartet.py",
           "cfg.micro, cfg.seq, cfg.seed)", "cfg.micro, cfg.seq, 0)", CLIPPED),
    Mutant("the targets are the inputs", "quartet.py",
           "accumulate(x, y)", "accumulate(x, x)", PLAIN),
    Mutant("the model trains on the tokens for validation", "quartet.py",
           "tokens.batch(corpus.train,", "tokens.batch(corpus.val,", PLAIN),
    Mutant("a microbatch need not divide the batch", "quartet.py",
           "check(batch % micro == 0,", "check(batch >= micro,",
           BAD),
    Mutant("a microbatch may have 128 sequences", "quartet.py",
           "min(64, fits)", "min(128, fits)", MICRO),
    Mutant("a microbatch of a wide model is as large as any", "quartet.py",
           "65536 / n_embd", "65536 / 64", MICRO),
    Mutant("a microbatch is rounded up to a power of two", "quartet.py",
           "int(math.log2(65536 / n_embd))", "math.ceil(math.log2(65536 / n_embd))", MICRO),

    # Evaluation
    Mutant("batches of the evaluation count equally", "quartet.py",
           "forward(x, y).double() * n_targets\n        count += n_targets",
           "forward(x, y).double()\n        count += 1", CLIPPED),
    Mutant("padding counts in the evaluation", "quartet.py",
           "n_targets = int((y >= 0).sum())", "n_targets = y.numel()", CLIPPED),
    Mutant("the validation loss is that of tokens to train on", "quartet.py",
           "tokens.val_batches(corpus.val,", "tokens.val_batches(corpus.train,", PLAIN),
    Mutant("the end of the run is not evaluated", "quartet.py",
           "done % eval_every == 0 or done == steps", "done % eval_every == 0", EVALUATED),
    Mutant("evaluations come one step too early", "quartet.py",
           "done % eval_every == 0 or", "(done + 1) % eval_every == 0 or", EVALUATED),
    Mutant("a run is evaluated a hundred times", "quartet.py",
           "max(1, steps // 10)", "max(1, steps // 100)", EVALUATED_TEN_TIMES),
    Mutant("--eval_every is not heard", "quartet.py",
           "cfg.eval_every or max(1, steps // 10)", "max(1, steps // 10)", EVALUATED),

    # Length, weights, sizes
    Mutant("tokens per parameter count embedding and head", "quartet.py",
           "phases_of(cfg, model.config.n_params)",
           "phases_of(cfg, sum(p.numel() for p in model.parameters()))", LENGTH_OF_A_RUN),
    Mutant("the last step may be a part of one", "tools/schedule.py",
           "cfg.steps or int(n_tokens // (cfg.batch * cfg.seq))",
           "cfg.steps or -int(-n_tokens // (cfg.batch * cfg.seq))", LENGTH),
    Mutant("a step is a microbatch of tokens", "tools/schedule.py",
           "int(n_tokens // (cfg.batch * cfg.seq))", "int(n_tokens // (cfg.micro * cfg.seq))",
           LENGTH),
    Mutant("the first weights do not depend on the seed", "quartet.py",
           "torch.manual_seed(cfg.seed)", "torch.manual_seed(0)", FIRST_WEIGHTS),
    Mutant("the first weights depend on what was drawn before", "quartet.py",
           "    torch.manual_seed(cfg.seed)\n", "", FIRST_WEIGHTS),
    Mutant("the vocabulary is padded with 64 entries more than it takes", "quartet.py",
           "64 * math.ceil(vocab_size / 64)", "64 * (vocab_size // 64 + 1)", PADDED),
    Mutant("the vocabulary is not padded", "quartet.py",
           "64 * math.ceil(vocab_size / 64)", "vocab_size", PADDED),
    Mutant("the model is made for the preset's own length of sequences", "quartet.py",
           "model_config(padded_vocab, cfg.seq)",
           "model_config(padded_vocab, PRESETS[cfg.size].seq)", PADDED),
    Mutant("packed products are not chosen by --gemm", "quartet.py",
           "checked(fp4.load_kernels, recipes, cfg.gemm)", "checked(fp4.load_kernels, recipes)",
           "tests/test_schedule.py::test_the_kernels_of_both_phases_are_loaded_at_first"),
    Mutant("all blocks but one may be kept", "quartet.py",
           "check(settings.keep_first + settings.keep_last <= preset.n_layer",
           "check(settings.keep_first + settings.keep_last < preset.n_layer", KEPT),
    Mutant("--keep_first is taken for --keep_last", "quartet.py",
           "cfg.keep_first, cfg.keep_last, backend)", "cfg.keep_last, cfg.keep_first, backend)",
           KEPT),
    Mutant("the axes do not change the row", "tools/schedule.py",
           "checked(recipe, cfg.precision, **axes)", "checked(recipe, cfg.precision)",
           TRAIN + "an_axis_changes_the_row_and_names_the_run"),
    Mutant("a CPU compiles by default", "quartet.py",
           'compile=device != "cpu" if', 'compile=True if', COMPILES),
    Mutant("quantised weights are never renewed", "quartet.py",
           "every microbatch of the next one.\n            quantize_weights()\n",
           "every microbatch of the next one.\n",
           SURVIVAL + "a_weight_is_quantised_once_a_step"),

    # What is logged
    Mutant("the utilisation is a thousand times as large", "quartet.py",
           "flops = speed *", "flops = 1e3 * speed *", SPEED),
    Mutant("the utilisation is for the longest sequence of the preset", "quartet.py",
           "flops_per_token(cfg.seq)", "flops_per_token(PRESETS[cfg.size].seq)", SPEED),
    Mutant("the speed is that of a microbatch", "quartet.py",
           "speed = cfg.batch * cfg.seq / seconds", "speed = cfg.micro * cfg.seq / seconds", SPEED),
    Mutant("the time of a step is logged in seconds", "quartet.py",
           "norm, 1000 * seconds, speed", "norm, seconds, speed", SPEED),
    Mutant("steps are numbered from 0 on", "quartet.py",
           "run.Step(done, loss, val,", "run.Step(step, loss, val,", EVALUATED),
    Mutant("the corpus is not in the log", "quartet.py",
           "run.log_head(vars(cfg), *made_by, corpus.description)",
           "run.log_head(vars(cfg), *made_by)",
           LOG_HEAD),

    # Numbers that are not finite
    Mutant("a loss that is not finite is trained on", "quartet.py",
           "if not (math.isfinite(loss) and math.isfinite(norm)):", "if False:",
           SURVIVAL + "a_gradient_that_is_not_finite_ends_a_run_before_its_step"),
    Mutant("only the loss has to be finite", "quartet.py",
           "if not (math.isfinite(loss) and math.isfinite(norm)):", "if not math.isfinite(loss):",
           SURVIVAL + "a_gradient_that_is_not_finite_ends_a_run_before_its_step"),
    Mutant("a validation loss of NaN is saved", "quartet.py",
           "is_finite = row.val is None or math.isfinite(row.val)", "is_finite = True",
           SURVIVAL + "a_validation_loss_of_nan_is_never_saved_in_the_middle_or_at_the_end"),
    Mutant("weights that are not finite are saved", "quartet.py",
           "if not (is_finite and checkpoint.all_finite(state)):", "if not is_finite:",
           SURVIVAL + "weights_and_moments_that_are_not_finite_are_not_saved"),
    Mutant("the log does not say that the run diverged", "quartet.py",
           "    log.write(run.log_diverged(sentence))\n", "",
           SURVIVAL + "weights_that_are_not_finite_are_said_in_the_log"),
    Mutant("a run that diverged ends as a mistake of the user", "quartet.py",
           "run.Diverged(sentence)", "UserError(sentence)", NOT_FINITE),

    # Saved, stopped, resumed
    Mutant("an evaluation saves nothing", "quartet.py",
           "if is_evaluated or is_late or stop.is_asked:", "if is_late or stop.is_asked:",
           EVALUATED),
    Mutant("the clock saves nothing", "quartet.py",
           "if is_evaluated or is_late or stop.is_asked:", "if is_evaluated or stop.is_asked:",
           SURVIVAL + "a_checkpoint_is_written_by_the_clock_as_well"),
    Mutant("a run that is stopped saves nothing", "quartet.py",
           "if is_evaluated or is_late or stop.is_asked:", "if is_evaluated or is_late:",
           SURVIVAL + "a_run_that_stopped_without_an_evaluation_cannot_end_there"),
    Mutant("the clock goes on at a checkpoint", "quartet.py",
           "history, log)\n                saved_at = time.monotonic()", "history, log)",
           SURVIVAL + "the_clock_starts_again_at_a_checkpoint"),
    Mutant("two checkpoints are kept whatever was asked for", "quartet.py",
           "checkpoint.save(cfg.folder, state, cfg.keep)", "checkpoint.save(cfg.folder, state, 2)",
           SURVIVAL + "so_many_checkpoints_are_kept_as_were_asked_for"),
    Mutant("a run that is resumed counts its steps from 0", "quartet.py",
           "for step in range(len(history), phase.end):",
           "for step in range(phase.end - len(history)):",
           DAMAGED),
    Mutant("the checkpoint is not put into model and optimizer", "quartet.py",
           "history = checkpoint.restore(state, model, optimizer)",
           "history = [run.Step(*row) for row in state[\"history\"]]", DAMAGED),
    Mutant("nothing seeds the random numbers of a step", "quartet.py",
           "            processes.seed_step(cfg.seed, step)\n", "", RESUMED),
    Mutant("every step draws the same random numbers", "quartet.py",
           "processes.seed_step(cfg.seed, step)", "processes.seed_step(cfg.seed, 0)", NOISE),
    Mutant("runs with two seeds draw the same random numbers", "quartet.py",
           "processes.seed_step(cfg.seed, step)", "processes.seed_step(0, step)", NOISE),
    Mutant("weight decay stays what it was before --resume", "quartet.py",
           '    optimizer.param_groups[0]["weight_decay"] = cfg.weight_decay\n', "", MAY_CHANGE),
    Mutant("another run is gone on with", "quartet.py",
           "cfg.allow_changes or not changes.keys() - run.MAY_CHANGE,",
           "cfg.allow_changes or True,", MAY_CHANGE),
    Mutant("--allow_changes is not heard", "quartet.py",
           "cfg.allow_changes or not changes.keys() - run.MAY_CHANGE,",
           "not changes.keys() - run.MAY_CHANGE,", MAY_CHANGE),
    Mutant("an earlier run is overwritten", "quartet.py",
           "run.set_aside(cfg.folder))", "os.makedirs(cfg.folder, exist_ok=True))", SET_ASIDE),
    Mutant("nothing locks the folder", "quartet.py",
           "with processes.held_by_rank_0(run.lock(cfg.folder)):",
           "os.makedirs(cfg.folder, exist_ok=True)\n        if True:",
           SURVIVAL + "a_second_process_on_a_folder_is_refused_with_the_name_of_the_first"),
    Mutant("a sample that fails ends the run", "quartet.py",
           "    except UserError as error:          # A sample never ends a run.",
           "    except ZeroDivisionError as error:",
           SURVIVAL + "a_model_whose_logits_are_not_finite_ends_no_run"),
    Mutant("a corpus that is too short is refused after the folder is made", "quartet.py",
           "    tokens.check_long_enough(corpus.train, cfg.seq)\n",
           "    run.set_aside(cfg.folder)\n"
           "    run.start_log(run.log_path(cfg.folder), run.log_head(vars(cfg), \"\", \"\"))\n",
           BAD),

    # Settings of a checkpoint
    Mutant("what was typed does not change a run that is resumed", "quartet.py",
           "own = {*typed, *run.NOT_IDENTITY,", "own = {*run.NOT_IDENTITY,", SETTINGS),
    Mutant("a run that is resumed goes on under its old name", "quartet.py",
           "own = {*typed, *run.NOT_IDENTITY,", "own = {*typed,", SETTINGS),
    Mutant("a checkpoint chooses the device", "quartet.py",
           '*run.NOT_IDENTITY, "device", "compile", "gemm"}', "*run.NOT_IDENTITY}",
           SURVIVAL + "a_checkpoint_of_a_gpu_is_of_use_on_a_cpu"),
    Mutant("the old length stays beside the one that was typed", "quartet.py",
           "        typed = {*typed, *run.LENGTHS}\n", "        typed = {*typed}\n", SETTINGS),
    Mutant("what a checkpoint says is not checked", "quartet.py",
           "return resolve(parse(cli.to_flags(settings)))", "return resolve(settings)", SETTINGS),
    Mutant("a run without a checkpoint cannot be resumed", "quartet.py",
           "return dataclasses.replace(cfg, resume=False)", "return cfg",
           SURVIVAL + "resuming_where_there_is_nothing_begins_anew_and_says_so"),
    Mutant("a run that is past its new end goes on", "quartet.py",
           "check(done < steps or done == steps and is_evaluated,", "check(True,", PAST_ITS_END),
    Mutant("a run may end with a step that was not evaluated", "quartet.py",
           "done == steps and is_evaluated,", "done == steps,",
           SURVIVAL + "a_run_that_stopped_without_an_evaluation_cannot_end_there"),
    Mutant("a finished run is finished once more", "quartet.py",
           "if done == steps and not is_another and is_finished:", "if False:", PAST_ITS_END),

    # Which runs
    Mutant("the rows come before the seeds", "tools/schedule.py",
           "for seed, *values in itertools.product(seeds, *choices):",
           "for *values, seed in itertools.product(*choices, seeds):", RUNS),
    Mutant("the seeds begin with 0", "tools/schedule.py",
           "range(settings.seed, settings.seed + settings.seeds)", "range(settings.seeds)", RUNS),
    Mutant("a seed too few is trained", "tools/schedule.py",
           "settings.seed + settings.seeds)\n", "settings.seed + max(1, settings.seeds - 1))\n",
           RUNS),
    Mutant("a blank after a comma belongs to the value", "tools/schedule.py",
           "[value.strip() for value in", "[value for value in", RUNS),
    Mutant("several runs with a name have that name", "tools/schedule.py",
           "if settings.name is not None and n_runs > 1:", "if False:", RUNS),
    Mutant("each run of several has all seeds", "tools/schedule.py",
           "seed=seed, seeds=1, **dict", "seed=seed, **dict", RUNS),
    Mutant("the number of runs leaves the seeds out", "tools/schedule.py",
           "settings.seeds * math.prod(map(len, choices))", "math.prod(map(len, choices))",
           LARGEST),
    Mutant("the last seed may be too large by one", "tools/schedule.py",
           "settings.seed + settings.seeds - 1 <=", "settings.seed + settings.seeds - 2 <=",
           LARGEST),
    Mutant("all means every row but the last", "tools/schedule.py",
           '",".join(RECIPES)\n    choices', '",".join(list(RECIPES)[:-1])\n    choices',
           ABLATION + "all_is_every_row"),
    Mutant("another run with the default name is set aside", "quartet.py",
           "        for cfg in configs:\n"
           "            run.refuse_other(cfg.folder, vars(cfg), remedy)\n",
           "        pass\n",
           SURVIVAL + "a_comma_list_moves_no_run_with_other_settings"),
    Mutant("only the first of several runs is looked for", "quartet.py",
           "for cfg in configs:\n", "for cfg in configs[:1]:\n",
           SURVIVAL + "a_comma_list_moves_no_run_with_other_settings"),
    Mutant("several runs may be sampled", "quartet.py",
           "check(is_one or settings.sample is None,", "check(True,",
           BAD),
    Mutant("an empty sample trains", "quartet.py",
           "if settings.sample is not None:\n            from",
           "if settings.sample:\n            from",
           SURVIVAL + "an_empty_sample_samples_from_the_start_and_trains_nothing"),
]
