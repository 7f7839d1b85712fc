"""Faults in what replays parts of a step, and the tests that notice them."""
from tools.mutants import Mutant

GRAPH = "tests/test_cuda_graph.py::test_"
ORDER = GRAPH + ("the_first_call_is_an_ordinary_one_the_second_is_recorded_and_all_see_their"
                 "_inputs")
SMALL = GRAPH + "small_models_on_one_gpu_are_replayed_and_others_if_asked"

MUTANTS = [
    Mutant("a replay reads the tokens of the recording", "tools/cuda_graph.py",
           "recorded.copy_(given)", "given.clone()", ORDER),
    Mutant("the first call is recorded", "tools/cuda_graph.py",
           "            return self.f(*inputs)\n", "", ORDER),
    Mutant("every call records", "tools/cuda_graph.py",
           "if self.graph is None:", "if True:", ORDER),
    Mutant("a recording is not replayed at once", "tools/cuda_graph.py",
           "        self.graph.replay()\n", "", ORDER),
    Mutant("large models are replayed", "tools/cuda_graph.py",
           "and n_embd < BUSY_FROM if", "if", SMALL),
    Mutant("several processes are replayed", "tools/cuda_graph.py",
           'device != "cpu" and not is_spread', 'device != "cpu"', SMALL),
    Mutant("a sharded model is replayed", "quartet.py",
           "settings.shard or processes.size() > 1", "processes.size() > 1",
           GRAPH + "a_run_that_is_spread_is_not_replayed"),
    Mutant("the gradients that a replay adds to are freed", "quartet.py",
           "zero_grad(set_to_none=not cfg.replay)", "zero_grad()",
           GRAPH + "a_replayed_run_keeps_the_memory_of_its_gradients"),
]
