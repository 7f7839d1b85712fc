"""Faults in what reads the counters of energy, and the tests that notice them."""
from tools.mutants import Mutant

ENERGY = "tools/energy.py"
T = "tests/test_energy.py::"
TEN_SECONDS = T + ("test_ten_seconds_of_work_are_measured_to_a_hundredth_wherever_the_counter_"
                   "stands")
WITHOUT = T + "test_a_gpu_without_a_counter_has_no_joules"
RUN = T + "test_a_run_has_taken_what_its_steps_have_and_that_is_said_a_token"
RESUMED = T + "test_a_resumed_run_says_only_what_the_steps_since_then_have_taken"
SHARED = T + "test_runs_that_share_a_gpu_do_not_claim_its_joules"
ALL_PROCESSES = ("tests/test_processes.py::test_the_joules_in_the_log_are_those_of_all_processes_"
                 "and_since_a_resume_of_its_steps")

MUTANTS = [
    Mutant("millijoules are taken for joules", ENERGY,
           "TotalEnergyConsumption(handle) / 1000", "TotalEnergyConsumption(handle)", TEN_SECONDS),
    Mutant("the GPU is looked for by torch's number", ENERGY,
           "pynvml.nvmlDeviceGetHandleByUUID(uuid)", "pynvml.nvmlDeviceGetHandleByIndex(0)",
           TEN_SECONDS),
    Mutant("NVML is asked before it is started", ENERGY,
           "        pynvml.nvmlInit()\n", "", TEN_SECONDS),
    Mutant("nobody waits until the GPU is done", ENERGY,
           "        machine.synchronize(self.device)\n", "", TEN_SECONDS),
    Mutant("the counter is believed before it has moved", ENERGY,
           "if now > before:", "if now >= before:",
           T + "test_a_counter_moves_before_it_is_believed"),
    Mutant("a GPU without a counter ends the program", ENERGY,
           "    except pynvml.NVMLError:\n        return None", "    except OSError:\n"
           "        return None", WITHOUT),
    Mutant("a counter that is lost ends a run", ENERGY,
           "except pynvml.NVMLError:        # No measurement", "except OSError:        # No",
           T + "test_a_counter_that_is_lost_ends_no_run"),
    Mutant("NVML's package has to be there", ENERGY,
           "    except ImportError:", "    except KeyError:",
           T + "test_without_the_package_there_are_no_joules"),
    Mutant("a counter that stands still has counted nothing", ENERGY,
           "            time.sleep(POLL)\n        return None",
           "            time.sleep(POLL)\n        return Movement(time.perf_counter(), before)",
           T + "test_a_counter_that_stands_still_counts_nothing"),
    Mutant("where something failed, the GPU is waited for", ENERGY,
           "        if error:                       # What", "        if False:   # What",
           T + "test_what_fails_is_not_waited_for"),
    Mutant("an idle GPU is not waited for", ENERGY,
           "            time.sleep(seconds)\n", "            pass\n",
           T + "test_the_power_of_an_idle_gpu_is_that_of_some_seconds"),
    Mutant("a resumed run has all tokens since its first step", ENERGY,
           "(len(history) - spent.after)", "len(history)", RESUMED),
    Mutant("the tokens are those of one sequence a step", ENERGY,
           "* cfg.batch * cfg.seq", "* cfg.seq", RUN),
    Mutant("a resumed run does not say that others have gone before", ENERGY,
           "if self.after else", "if not self.after else", RESUMED),
    Mutant("of several runs on a GPU, each claims the joules of all", ENERGY,
           "is not None and cfg.jobs == 1", "is not None", SHARED),
    Mutant("the joules are those of the first process", ENERGY,
           "[joules] = processes.sums(meter.joules if is_known else math.nan, device=cfg.device)",
           "joules = meter.joules if is_known else math.nan", ALL_PROCESSES),
    Mutant("the memory in a log has its joules behind it", "tools/run.py",
           'memory = rest.partition(", energy ")[0]', "memory = rest",
           T + "test_the_last_line_of_a_log_says_the_joules_and_the_memory_is_read_as_before"),
    Mutant("the peak of memory is that of what came before the run, too", ENERGY,
           "    machine.forget_peak_memory(cfg.device)\n", "",
           T + "test_the_peak_of_a_run_s_memory_is_that_of_its_steps"),
]
