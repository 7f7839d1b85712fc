"""Faults in what several processes do together, and the tests that notice them."""
from tools.mutants import Mutant

TEST = "tests/test_processes.py::test_"

SAME = TEST + "several_processes_train_the_run_of_one"
TWO = SAME + "[two]"
THREE = SAME + "[three]"
SHARED = TEST + "the_microbatches_of_a_step_are_shared_out"
REPEATS = TEST + ("fp4_repeats_itself_bit_for_bit_and_is_not_that_of_another_number_of_processes"
                  "[two]")
GENERATORS = TEST + "no_two_seeds_steps_and_ranks_have_the_same_random_numbers"
DEALT = TEST + "items_are_dealt_so_that_each_counts_once_and_all_processes_have_as_many[3]"
UNEVEN = TEST + "validation_batches_that_do_not_divide_give_the_loss_of_one_process"
REFUSED = TEST + "a_mistake_is_told_once_with_its_exit_code_and_nothing_is_written"
ALONE = TEST + "one_process_alone_is_told_to_use_torchrun_for_shard"
IN_USE = TEST + "a_folder_in_use_is_refused_in_one_sentence_and_stays_as_it_is"
FAILS = TEST + "one_that_fails_alone_ends_all_at_once_and_the_run_goes_on_from_its_checkpoint"
TOGETHER = TEST + "a_mistake_of_one_where_all_are_together_is_told_once_by_it_alone"
NAN = TEST + "a_nan_of_one_process_is_divergence_of_all"
SIGNAL = TEST + "a_signal_to_any_process_stops_all_after_the_same_step_with_a_checkpoint"
DUE = TEST + "a_checkpoint_that_is_due_in_one_process_is_written_by_all[1]"
LATER = TEST + "a_signal_that_comes_when_the_processes_have_met_already_stops_them_a_step_later"
GOES_ON = TEST + "a_run_goes_on_with_any_number_of_processes_sharded_or_not"
DAMAGED = TEST + "a_damaged_shard_gives_way_to_the_checkpoint_before"
METADATA = TEST + "the_metadata_of_shards_is_checked_as_well"
KEPT = TEST + "checkpoints_go_with_their_shards_and_discard_removes_all"
FULL = TEST + "shards_that_cannot_be_written_leave_the_checkpoint_before"
SAMPLE = TEST + "one_process_samples_from_shards_what_several_do"
OTHER = TEST + "a_checkpoint_of_another_model_is_refused_in_one_sentence"
TYPED = TEST + "the_batch_may_be_typed_again"
CANNOT = TEST + "what_cannot_go_on_is_told_once"
SMALLER = TEST + "a_microbatch_that_no_longer_fits_the_share_is_made_smaller"
ABLATION = TEST + "an_ablation_trains_each_run_with_all_processes_and_prints_its_table_once"
FILES = TEST + "only_the_first_process_looks_at_the_files_of_an_ablation"
FAIL_ALONE = TEST + "one_that_fails_alone_in_an_ablation_says_why_and_ends_it"
FAIL_ALL = TEST + "runs_that_fail_or_diverge_stop_no_other_and_are_told_once"

PROCESSES = "tools/processes.py"
CHECKPOINT = "tools/checkpoint.py"
CLI = "tools/cli.py"
ABLATIONS = "tools/ablation.py"

MUTANTS = [
    # What is exchanged
    Mutant("every process takes the first one's seed", PROCESSES,
           "(seed, step, rank())", "(seed, step, 0)", GENERATORS),
    Mutant("each step has the same random numbers", PROCESSES,
           "(seed, step, rank())", "(seed, rank())", GENERATORS),
    Mutant("seeds and steps are added up", PROCESSES,
           "(seed, step, rank())", "(seed + step, rank())", GENERATORS),
    Mutant("the batches that are dealt twice count twice", PROCESSES,
           "yield hand[rank() if is_own else 0], is_own",
           "yield hand[rank() if is_own else 0], True", f"{DEALT} {UNEVEN}"),
    Mutant("who has no batch of the last round sits it out", PROCESSES,
           "        yield hand[rank() if is_own else 0], is_own",
           "        if is_own:\n            yield hand[rank()], is_own", DEALT),
    Mutant("the loss of the first process is the loss", PROCESSES,
           "return sum(losses) / len(losses), any", "return losses[0], any", TWO),
    Mutant("the loss is the sum over the processes", PROCESSES,
           "return sum(losses) / len(losses), any", "return sum(losses), any", TWO),
    Mutant("the validation loss is that of the first process", PROCESSES,
           "[sum(of_all) for of_all in", "[of_all[0] for of_all in", THREE),
    Mutant("gradients are not averaged", PROCESSES,
           "    if size() == 1:\n        return model\n", "    return model\n", TWO),
    Mutant("a signal stops nobody", PROCESSES,
           "stop.agree_on(int(max(received)))", "pass",
           SIGNAL + "[two-other]"),
    Mutant("a process that has a signal stops without the others", PROCESSES,
           "is_alone=size() == 1)", "is_alone=True)", LATER),
    Mutant("a process that has a signal does not wait for the others", "data/signals.py",
           "return self.is_agreed and self.received is not None",
           "return self.received is not None", LATER),
    Mutant("nobody says that another process has a signal", "data/signals.py",
           "            self.note(signal_number)\n        self.received",
           "            pass\n        self.received", SIGNAL + "[two-other]"),
    Mutant("all say that they stop", PROCESSES,
           "is_announced=rank() == 0", "is_announced=True", SIGNAL + "[two-all]"),
    Mutant("a sharded weight has the norm of one process", PROCESSES,
           'whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor',
           'whole = getattr(tensor, "_local_tensor", tensor)',
           survives="torch 2.13 sums the norm up itself, so that all processes have it; the call "
                    "is for versions that leave that to the caller"),

    # What is due
    Mutant("only rank 0 can be late for a checkpoint", PROCESSES,
           "any(are_late)", "bool(are_late[0])", DUE),

    # What is told
    Mutant("all print", PROCESSES,
           "            sys.stdout = sys.stderr = open", "            sys.stderr = open", TWO),
    Mutant("all warn", PROCESSES,
           "            sys.stdout = sys.stderr = open", "            sys.stdout = open", ABLATION),
    Mutant("torch warns of a name that it has changed", PROCESSES,
           'warnings.simplefilter("ignore", FutureWarning)', "pass", TWO),
    Mutant("all tell a mistake of all", PROCESSES,
           "is_told_elsewhere = rank() != its_rank", "is_told_elsewhere = False", IN_USE),
    Mutant("nobody tells a mistake of all", PROCESSES,
           "is_told_elsewhere = rank() != its_rank", "is_told_elsewhere = True", IN_USE),
    Mutant("the first process tells the mistake of another", PROCESSES,
           "raise told_by(its_rank, error)", "raise told_by(0, error)", TOGETHER + "[1]"),
    Mutant("only who makes a mistake stops for it", PROCESSES,
           "    for its_rank, error in enumerate(gather_objects(error)):\n",
           "    gather_objects(error)\n    for its_rank, error in enumerate([error]):\n",
           TOGETHER + "[1]"),
    Mutant("what the first process raises, only that one raises", PROCESSES,
           "        except ERRORS as error:\n            outcome[1] = error",
           "        except ():\n            pass", IN_USE),
    Mutant("that another process is gone is a fault of ours", PROCESSES,
           '"Connection closed by peer", "Connection reset', '"Connection reset',
           FAILS + "[two-mistake]"),
    Mutant("a batch that does not divide is trained in part", PROCESSES,
           "check(batch % n == 0, f", "check(True, f", REFUSED + "[batch]"),
    Mutant("a microbatch that does not divide is trained in part", PROCESSES,
           "check(share % micro == 0, f", "check(True, f", REFUSED + "[micro]"),
    Mutant("a batch below the number of processes is told to be 0", PROCESSES,
           "(lower, lower + n) if number > 0", "(lower, lower + n)", REFUSED + "[small-batch]"),
    Mutant("an unknown flag is told by all", CLI,
           'is_told_elsewhere = os.environ.get("LOCAL_RANK", "0") != "0"',
           "is_told_elsewhere = False",
           REFUSED + "[flag]"),
    Mutant("the exit code is not told", CLI,
           'sentence += f" (exit code {code})"', "pass", REFUSED + "[batch]"),
    Mutant("all tell that they were stopped", CLI,
           'return name if rank == "0" else ""', "return name", SIGNAL + "[two-all]"),
    Mutant("nobody knows who made a mistake alone", CLI,
           'return f"{name}, process {rank}"', "return name", FAILS + "[two-mistake]"),

    # The trainer
    Mutant("each process computes the whole batch", PROCESSES,
           "items[rank()::size()]", "items[0::1]", SHARED),
    Mutant("each process computes the first one's share", PROCESSES,
           "items[rank()::size()]", "items[0::size()]", TWO),
    Mutant("a microbatch is weighted by the whole batch", "quartet.py",
           "forward_backward(trained, n_micro // processes.size())",
           "forward_backward(trained, n_micro)", TWO),
    Mutant("gradients are averaged with the first microbatch", "quartet.py",
           "i == own[-1]", "i == own[0]", TWO),
    Mutant("all write the log", PROCESSES,
           "return path if rank() == 0 else os.devnull", "return path", TWO),
    Mutant("a step does not seed its generators", "quartet.py",
           "            processes.seed_step(cfg.seed, step)\n", "", GOES_ON + "[fp4-two-two]"),
    Mutant("padded targets of a batch that does not count do", "quartet.py",
           "int((y >= 0).sum()) * is_own", "int((y >= 0).sum())", UNEVEN),
    Mutant("one process takes --shard", "quartet.py",
           "check(not settings.shard or cli.is_one_of_many(),",
           "check(True or cli.is_one_of_many(),", ALONE),
    Mutant("a microbatch of one process stays that of several", "quartet.py",
           "micro = processes.fitting(settings.micro, settings.batch)", "micro = settings.micro",
           SMALLER),
    Mutant("each process decides how a run goes on", "quartet.py",
           "processes.by_rank_0(lambda: continued(cfg, settings, typed))",
           "continued(cfg, settings, typed)", CANNOT),
    Mutant("the batch cannot be typed with --resume", "quartet.py",
           "processes.fitting(settings.micro, settings.batch)",
           'processes.fitting(settings.micro, old["batch"])', TYPED + "[batch]"),
    Mutant("what cannot be trained ends one process alone", "quartet.py",
           "processes.all_or_none(lambda: prepare(cfg, corpus))", "prepare(cfg, corpus)",
           TOGETHER + "[1]"),

    # Checkpoints
    Mutant("a number that is not finite elsewhere is saved", CHECKPOINT,
           'return all(verdict for verdict, in processes.gather_numbers(is_finite, device="cpu"))',
           'return processes.gather_numbers(is_finite, device="cpu")[0][0]',
           NAN + "[moment-two-sharded]"),
    Mutant("other processes get no weights", CHECKPOINT,
           "        set_model_state_dict(model, weights, options=options)\n", "        pass\n",
           GOES_ON + "[bf16-two-one]"),
    Mutant("other processes get no moments", CHECKPOINT,
           "set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)\n",
           "pass\n", GOES_ON + "[bf16-one-two]"),
    Mutant("shards are not read", CHECKPOINT,
           '            read_shards(state, {"model": weights})\n', "",
           GOES_ON + "[bf16-two-sharded-one]"),
    Mutant("a damaged shard is loaded", CHECKPOINT,
           "check(checksum(file) == expected,", "check(True,", DAMAGED + "[bit]"),
    Mutant("a shard that is missing is not missed", CHECKPOINT,
           "        check(os.path.isfile(file), f\"there is no {file}: {reason}\")\n",
           "        if not os.path.isfile(file):\n            continue\n", DAMAGED + "[file]"),
    Mutant("the metadata of shards has no checksum", CHECKPOINT,
           '    files |= processes.by_rank_0(lambda: checksums(path, ".metadata"))\n', "",
           METADATA),
    Mutant("shards of removed checkpoints stay", CHECKPOINT,
           "    remove_shards(folder, keep=[*kept, step])\n", "", KEPT),
    Mutant("shards of the checkpoint before are removed", CHECKPOINT,
           "keep=[*kept, step]", "keep=[step]", DAMAGED + "[bit]"),
    Mutant("--discard leaves the shards", CHECKPOINT,
           "        os.remove(path)\n    remove_shards(folder)\n", "        os.remove(path)\n",
           KEPT),
    Mutant("shards that cannot be written are a fault of ours", CHECKPOINT,
           "    except dcp.api.CheckpointException as error:\n"
           "        raise processes.told_by(0, UserError",
           "    except () as error:\n        raise processes.told_by(0, UserError", FULL),
    Mutant("what shards lack is told as a traceback", CHECKPOINT,
           "error, _ = next(iter(error.failures.values()))", "pass",
           OTHER + "[to-one-two-sharded]"),
    Mutant("one process is warned that it is alone", CHECKPOINT,
           'warnings.simplefilter("ignore", UserWarning)', "pass", SAMPLE),

    # Ablations
    Mutant("--jobs under torchrun starts processes of each process", ABLATIONS,
           "jobs == 1 or not cli.is_one_of_many()", "True",
           REFUSED + "[jobs-of-one]"),
    Mutant("each process looks what is missing", ABLATIONS,
           "processes.by_rank_0(lambda: missing_runs(configs, corpus))",
           "missing_runs(configs, corpus)", FILES),
    Mutant("each process looks what has ended", ABLATIONS,
           "processes.by_rank_0(lambda: ended_runs(configs, corpus))",
           "ended_runs(configs, corpus)",
           FILES),
    Mutant("each process writes the table", ABLATIONS,
           "processes.by_rank_0(lambda: report(runs, path))", "report(runs, path)", FILES),
    Mutant("one that failed alone goes on to the next run", ABLATIONS,
           "            if not processes.all_have(error):\n                raise\n", "",
           FAIL_ALONE),
    Mutant("all tell which runs failed", ABLATIONS,
           "processes.told_by(0, failure) if failed", "failure if failed", FAIL_ALL),
]
