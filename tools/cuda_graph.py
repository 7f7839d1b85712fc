"""
Parts of a training step, replayed as CUDA graphs.

A small model waits for the host. Python and PyTorch need several microseconds to launch a kernel,
and a step has hundreds, most of which the GPU finishes sooner than the next one is launched. A CUDA
graph is a recording of such launches. The host starts all of them with one call.

A replay runs the same kernels at the same addresses. So inputs are copied to where the recorded
call has read them, and gradients have to be added to tensors that stay (zero_grad must not free
them). Random rotations and noise are new in each replay: torch hands the seed and the position of
its generator to the graph when it is replayed. What only Python does is not recorded, the look
whether a weight's quantised copy is fresh, say; but a training loop calls quantize_weights after
each change (stored_weight.py in fp4/).
"""
import warnings

import torch

from data.files import check

# The width from which on a model keeps a GPU busy: that of 30M. A graph would gain nothing there,
# and its memory stays reserved for it.
BUSY_FROM = 640


def pays(is_asked, device, n_embd, is_spread):
    """Whether a run replays its steps: what its flag says, or, for None, whether that is faster.
    One that is spread over several processes, or sharded, exchanges data within a step.

    Raises UserError where it is asked for and cannot be.
    """
    can_be = device != "cpu" and not is_spread
    check(can_be or not is_asked, "replay: a run of one process on a GPU can be replayed, no other")
    return can_be and n_embd < BUSY_FROM if is_asked is None else is_asked


class Replayed:
    """A function of tensors, which the second call records, and which is replayed from then on.

    The first call is an ordinary one: compilers and libraries have to have done their work before a
    recording. What is returned is overwritten by the next call.
    """

    def __init__(self, f):
        self.f = f
        self.inputs = None
        self.graph = None

    def __call__(self, *inputs):
        if self.inputs is None:
            self.inputs = [tensor.clone() for tensor in inputs]
            return self.f(*inputs)
        if self.graph is None:
            self.record()
        for recorded, given in zip(self.inputs, inputs, strict=True):
            recorded.copy_(given)
        self.graph.replay()
        return self.result

    def record(self):
        self.graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            # A model without quantised weights has nothing to do where others quantise theirs.
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")
            with torch.cuda.graph(self.graph):
                self.result = self.f(*self.inputs)


def forward_backward(model, n_micro):
    """Returns a function of a microbatch's x and y [B, T], one of n_micro. It adds the gradient of
    their share of the loss to the gradients of the model, and returns that share, a tensor of one
    number."""
    def accumulate(x, y):
        loss = model(x, y) / n_micro
        loss.backward()
        return loss.detach()
    return accumulate
