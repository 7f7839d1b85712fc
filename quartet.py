"""
Train a Llama in 4-bit floating point with Quartet's method (arXiv 2505.14669), or in any other
precision of the table in fp4/recipes.py.

    python quartet.py                                  # FP4: tiny on a CPU, 30M on a GPU
    python quartet.py --precision bf16,fp4             # both, from the same weights and batches
    python quartet.py --size 30M --data python         # the paper's smallest model, on a GPU
    python quartet.py --sample "def main("             # continue a text with the trained model
    torchrun --nproc_per_node=4 quartet.py             # the same run, on four GPUs together

A run leaves log.csv, curve.svg and ckpt.pt in out/NAME.

Read from top to bottom: settings, schedule and evaluation, one run, main.
"""
import dataclasses
import math
import os
import sys
import time
from dataclasses import dataclass
from functools import partial

from data import signals
from data.files import UserError, check, checked
from fp4 import AXES, RECIPES
from tools import cli, run, schedule    # the command line; the log; the length and recipes
from tools.cli import flag

CHECKPOINT_SECONDS = 15 * 60            # A run that is killed loses no more than that.


# ---- settings

def axis_flag(axis):
    """A flag that changes the precision's row for one run."""
    return flag(None, "changes the row: " + " | ".join(AXES[axis]))


@dataclass(frozen=True)
class Settings:
    """Every flag of the command line: its type, default, meaning and bounds. None: not given."""

    # Which products are quantised, and how. A comma list makes an ablation.
    precision: str = flag("fp4", " | ".join(RECIPES) + "; a comma list, or all, trains each")
    keep_first: int = flag(0, "number of blocks at the beginning that are not quantised", least=0)
    keep_last: int = flag(0, "number of blocks at the end that are not quantised", least=0)

    # The model and its data.
    size: str = flag(None, "tiny | 3M | 30M | 50M | 100M | 200M | 430M | 800M | 1600M | 3200M | "
                           "7B; default: tiny on a CPU, 30M on a GPU")
    data: str = flag(None, "stdlib | python | shakespeare | fineweb | c4 | a text file | a folder; "
                           "default: python, for tiny stdlib")
    vocab: int = flag(None, "entries of the vocabulary that is made for the corpus; "
                            "default: 4096, for c4 32768", least=1)

    # Batch, length and optimizer.
    seq: int = flag(None, "tokens in a sequence; default: 512, for tiny and 3M 256", least=1)
    batch: int = flag(None, "sequences in a step; default: 512, for tiny 8, for 3M 128", least=1)
    micro: int = flag(None, "sequences in a microbatch; default: by size", least=1)
    steps: int = flag(None, "length of the run in steps; default: 350 for tiny", least=1)
    tokens: int = flag(None, "length of the run in tokens", least=1)
    tokens_per_param: float = flag(None, "length of the run in tokens per parameter; default: 25",
                                   least=0, most=1_000_000)
    lr: float = flag(None, "peak learning rate; default: the paper's for the size", least=0)
    weight_decay: float = flag(0.1, "weight decay of the linear layers inside the blocks", least=0)
    clip: float = flag(1.0, "largest norm of the gradient; 0: any", least=0)
    seed: int = flag(0, "seed of weights, batches, rotations and rounding", least=0)
    seeds: int = flag(1, "number of seeds to train with, from --seed on", least=1)

    # Files.
    jobs: int = flag(1, "of several runs, how many train at a time, each with its log.txt",
                     least=1, most=1024)
    eval_every: int = flag(None, "steps between evaluations, each with a checkpoint; "
                                 "default: a tenth of the run", least=1)
    weight_stats: bool = flag(None, "log what steps do to quantised weights (tools/README.md)")
    keep: int = flag(2, "number of checkpoints that are kept, the newest as ckpt.pt", least=1)
    out: str = flag("out", "folder of all runs")
    name: str = flag(None, "folder of this run; default: SIZE-PRECISION")
    resume: bool = flag(False, "continue from the run's checkpoint, if there is one, with its "
                               "settings; one process on a CPU does it bit for bit")
    allow_changes: bool = flag(False, "with --resume: go on although a setting differs that makes "
                                      "another run")
    shard: bool = flag(False, "with torchrun: spread the model over the processes, for one that "
                              "does not fit (tools/README.md)")
    discard: bool = flag(False, "remove the checkpoints when the run is finished")

    # The machine.
    compile: bool = flag(None, "compile the model with torch.compile; default: on a GPU")
    replay: bool = flag(None, "replay each step as CUDA graphs; default: small models on a GPU")
    gemm: str = flag("auto", "which product a GPU multiplies FP4 with: auto | fp8 | bf16 | fp32 | "
                             "own | library (fp4/README.md)")
    device: str = flag(None, "cpu | cuda | cuda:1 ...; default: a GPU if there is one")
    dtype: str = flag(None, "of activations: bfloat16 | float32; default: float32 on a CPU")

    # Sampling.
    sample: str = flag(None, "do not train: continue this text with the run's checkpoint; -: each "
                             "line of the standard input")
    sample_tokens: int = flag(200, "length of a sample in tokens", least=0, most=1_000_000)
    temperature: float = flag(0.8, "divides a sample's logits; 0: the likeliest tokens", least=0)
    top_k: int = flag(50, "draw a sample's tokens from the k likeliest; 0: from all", least=0)
    top_p: float = flag(1.0, "and from the fewest of these that have this probability together",
                        least=0, most=1)

    # Another row for the last steps of the run.
    switch: str = flag(None, "trains the last steps with another row, as in 0.8:fp4-bwd or "
                             "0.8:fp4+scale=mse+rotation=128 (tools/schedule.py)")

    # Changes to the precision's row, which fp4/axes.py explains: seven columns, with one value or
    # three for forward:dgrad:wgrad, some also for the left/right operand; three products to switch
    # on or off; what acts on the weights between steps, such as cage or cage:10:0.8; and the format
    # of the inputs of down projections. A comma list makes an ablation here, too.
    format: str = axis_flag("format")
    scale: str = axis_flag("scale")
    multiplier: str = axis_flag("multiplier")
    rotation: str = axis_flag("rotation")
    signs: str = axis_flag("signs")
    rounding: str = axis_flag("rounding")
    mean_split: str = axis_flag("mean_split")
    forward: str = axis_flag("forward")
    dgrad: str = axis_flag("dgrad")
    wgrad: str = axis_flag("wgrad")
    post_step: str = axis_flag("post_step")
    down_input: str = axis_flag("down_input")

    @property
    def folder(self):
        return os.path.join(self.out, self.name)


def parse(argv):
    return cli.parse(Settings, argv, __doc__)


# The imports below take seconds, and torch may be missing. So the command line is read here for
# the first time, to answer --help and mistyped flags; main() reads it again. Where only .venv has
# torch, the script starts over with the Python of .venv.
if __name__ == "__main__":
    cli.start(parse)

import torch

import fp4                              # the quantised linear layer
from data import tokens
from data.corpus import open_corpus
from data.progress import bar_on_terminal
from fp4.backend import GEMMS
from model import PRESETS, Llama
from tools import checkpoint, cuda_graph, energy, machine, processes


def resolve(settings):
    """The settings of one run, checked, with the defaults that depend on others filled in."""
    device = machine.resolve_device(settings.device)
    size = settings.size or ("tiny" if device == "cpu" else "30M")
    check(size in PRESETS, f"size {size!r} is not one of {', '.join(PRESETS)}")
    preset = PRESETS[size]
    check(settings.keep_first + settings.keep_last <= preset.n_layer,
          f"{size} has {preset.n_layer} blocks: keep_first {settings.keep_first} and "
          f"keep_last {settings.keep_last} are more")
    schedule.recipes_of(settings)
    dtype = settings.dtype or ("float32" if device == "cpu" else "bfloat16")
    check(dtype in ("bfloat16", "float32"), f"dtype {dtype!r} is not bfloat16 or float32")
    check(settings.gemm in GEMMS, f"gemm {settings.gemm!r} is not one of {', '.join(GEMMS)}")
    check(device != "cpu" or settings.gemm == "auto", "gemm chooses among the products of a GPU")
    check(settings.lr is None or settings.lr > 0, "lr 0 would train nothing: give more")

    batch = settings.batch or preset.batch
    micro = settings.micro or default_microbatch(batch // processes.size(), preset.n_embd)
    check(batch % micro == 0,
          f"batch {batch} does not divide into microbatches of {micro} sequences")
    lengths = [name for name in run.LENGTHS if getattr(settings, name) is not None]
    check(len(lengths) <= 1, f"give only one of {' and '.join(lengths)}")
    if not lengths:
        settings = dataclasses.replace(
            settings, steps=preset.steps, tokens_per_param=preset.tokens_per_param)
    return dataclasses.replace(
        settings,
        device=device,
        size=size,
        dtype=dtype,
        batch=batch,
        micro=micro,
        seq=settings.seq or preset.seq,
        lr=settings.lr or preset.lr,
        data=preset.data if settings.data is None else settings.data,
        compile=device != "cpu" if settings.compile is None else settings.compile,
        replay=cuda_graph.pays(
            settings.replay, device, preset.n_embd, settings.shard or processes.size() > 1),
        name=run.folder_name(
            settings.out, settings.name, f"{size}-{run.label(vars(settings))}"),
    )


def default_microbatch(batch, n_embd):
    """A power of two that divides the batch, at most 64, and fewer sequences of a wide model."""
    fits = 2 ** int(math.log2(65536 / n_embd))
    return math.gcd(batch, min(64, fits))


# ---- schedule, data, evaluation

def lr_at(step, steps, peak):
    """The learning rate rises from peak/100 for a tenth of the run, then falls to peak/10; both
    along a cosine."""
    warmup = steps // 10
    if step < warmup:
        lowest = peak / 100
        distance = 1 - step / warmup
    else:
        lowest = peak / 10
        distance = (step - warmup) / max(1, steps - 1 - warmup)
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * distance)) / 2


def to_device(batch, device):
    return [torch.from_numpy(array).to(device, non_blocking=True) for array in batch]


@torch.no_grad()
def evaluate(forward, corpus, cfg):
    """Mean loss over every token of the validation set, whose batches the processes share."""
    total = 0
    count = 0
    batches = tokens.val_batches(corpus.val, cfg.micro, cfg.seq)
    for batch, is_own in processes.deal(batches):
        x, y = to_device(batch, cfg.device)
        n_targets = int((y >= 0).sum()) * is_own
        total += forward(x, y).double() * n_targets
        count += n_targets
    total, count = processes.sums(total, count, device=cfg.device)
    return total / count


# ---- one run

def build_model(cfg, vocab_size):
    """The model of a run with its first weights, which depend on the seed alone."""
    torch.manual_seed(cfg.seed)
    if cfg.compile:
        # In an ablation one run follows another, and torch keeps only 8 compiled versions.
        torch.compiler.reset()
    recipes = schedule.recipes_of(cfg)
    backend = checked(fp4.load_kernels, recipes, cfg.gemm)
    padded_vocab = 64 * math.ceil(vocab_size / 64)      # Matrix units are faster on such sizes.
    config = PRESETS[cfg.size].model_config(padded_vocab, cfg.seq)
    dtype = getattr(torch, cfg.dtype)
    model = Llama(config, recipes[0], dtype, cfg.keep_first, cfg.keep_last, backend)
    # A sharded model is too large for one GPU: fp4.shard moves it there, piece by piece.
    return model if cfg.shard else model.to(cfg.device)


def build_optimizer(model, cfg):
    """AdamW; only the weight matrices inside the blocks decay."""
    decayed = [p for p in model.blocks.parameters() if p.dim() == 2]
    decayed_ids = {id(p) for p in decayed}
    others = [p for p in model.parameters() if id(p) not in decayed_ids]
    groups = [
        dict(params=decayed, weight_decay=cfg.weight_decay),
        dict(params=others, weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def train(cfg):
    """Train one model. What came out is in log.csv and ckpt.pt of its folder.

    Raises UserError for a mistake, run.Diverged when a number is no longer finite, and Stopped or
    KeyboardInterrupt when a signal has stopped it after a step.
    """
    corpus = processes.one_before_others(lambda: open_corpus(cfg.data, cfg.vocab))
    with machine.errors_in_words(cfg):
        model, phases = processes.all_or_none(lambda: prepare(cfg, corpus))
        if cfg.shard:
            fp4.shard(model, model.blocks, cfg.device, model.dtype)
        optimizer = build_optimizer(model, cfg)
        if not cfg.resume:              # An earlier run of this name is kept.
            processes.by_rank_0(lambda: run.set_aside(cfg.folder))
        with processes.held_by_rank_0(run.lock(cfg.folder)):
            history = begin(cfg, corpus, model, optimizer, phases)
            announce(cfg, corpus, model, phases)
            with energy.of_run(cfg, history) as spent, processes.between_steps() as stop:
                for phase in phases:    # one, or two with --switch
                    if len(history) < phase.end:
                        set_recipe(cfg, model, phase)
                        train_steps(cfg, corpus, model, optimizer, history, phase, stop)
            finish(cfg, model, corpus, history, spent)


def prepare(cfg, corpus):
    """The model of a run, and its schedule.Phases. What cannot be trained is refused here, before
    anything is written."""
    tokens.check_long_enough(corpus.train, cfg.seq)
    processes.check_divides(cfg.batch, cfg.micro)
    check(not (cfg.shard and cfg.weight_stats),
          "a sharded model has no weight_stats: they need whole weights")
    model = build_model(cfg, corpus.vocabulary.size)
    return model, schedule.phases_of(cfg, model.config.n_params)


def set_recipe(cfg, model, phase):
    """Give the blocks that are quantised the recipe of a phase. Their weights stay as they are, and
    so do the optimizer's moments."""
    quantized = model.blocks[cfg.keep_first:len(model.blocks) - cfg.keep_last]
    fp4.set_recipe(quantized, phase.recipe, model.backend)
    if cfg.compile:
        torch.compiler.reset()          # What is compiled already is of another recipe.


def train_steps(cfg, corpus, model, optimizer, history, phase, stop):
    """The training loop: from the first step that is not in history to the last of a phase."""
    steps = phase.steps
    n_micro = cfg.batch // cfg.micro
    eval_every = cfg.eval_every or max(1, steps // 10)
    forward = compiled(model, cfg)
    trained = forward if cfg.shard else processes.average_gradients(forward)
    accumulate = cuda_graph.forward_backward(trained, n_micro // processes.size())
    clip = partial(torch.nn.utils.clip_grad_norm_, list(model.parameters()), cfg.clip or math.inf)
    post_step = fp4.post_step_of(model)
    weight_stats = fp4.weight_stats_of(model, cfg.weight_stats)
    quantize_weights = partial(fp4.quantize_weights, model)
    if cfg.replay:                      # Then the host starts each of them with one call.
        accumulate, clip, quantize_weights = map(
            cuda_graph.Replayed, (accumulate, clip, quantize_weights))
    quantize_weights()
    saved_at = time.monotonic()
    log = run.Log(processes.own_path(run.log_path(cfg.folder)), weight_stats.columns)
    bar = bar_on_terminal(total=steps, initial=len(history), desc=cfg.name)
    with log, bar:
        for step in range(len(history), phase.end):
            done = step + 1
            is_evaluated = done % eval_every == 0 or done == steps
            if is_evaluated:
                weight_stats.before_step()
            start = time.perf_counter()
            lr = lr_at(step, steps, cfg.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # Which sequences a batch has is a function of the step and the seed alone. Several
            # processes share its microbatches. The gradients of these add up, each weighted by its
            # share of the batch.
            processes.seed_step(cfg.seed, step)
            loss = torch.zeros((), device=cfg.device)
            own = processes.share_of(range(step * n_micro, done * n_micro))
            for i in own:
                batch = tokens.batch(corpus.train, i, cfg.micro, cfg.seq, cfg.seed)
                x, y = to_device(batch, cfg.device)
                fp4.mark_last(trained, i == own[-1])
                loss += accumulate(x, y)

            norm = processes.number(clip())
            is_late = time.monotonic() - saved_at > CHECKPOINT_SECONDS
            loss, is_late = processes.end_of_step(loss, is_late, stop, cfg.device)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                row = run.Step(done, loss, None, lr, norm)
                log.write_row(row)
                diverge(cfg, row, log)
            optimizer.step()
            # A replay adds to the same gradients in memory each time.
            optimizer.zero_grad(set_to_none=not cfg.replay)
            # What else the recipe does to weights, such as pulling them towards their grid.
            post_step(lr, done, steps)
            # A weight is quantised once a step and serves every microbatch of the next one.
            quantize_weights()
            machine.synchronize(cfg.device)
            seconds = time.perf_counter() - start

            val = round(evaluate(forward, corpus, cfg), 4) if is_evaluated else None
            bpb = corpus.bits_per_byte(val)
            beyond = fp4.blocks_beyond_window(model, x, y) if is_evaluated else None
            speed = cfg.batch * cfg.seq / seconds
            flops = speed * model.config.flops_per_token(cfg.seq) / processes.size()
            mfu = machine.utilisation(cfg.device, flops)
            history.append(run.Step(done, loss, val, lr, norm, 1000 * seconds, speed, mfu, beyond,
                                    bpb, weight_stats.after_step()))
            log.write_row(history[-1])
            if is_evaluated or is_late or stop.is_asked:
                save(cfg, corpus, model, optimizer, history, log)
                saved_at = time.monotonic()
            # What follows prints, and there may be no terminal any more.
            stop.raise_if_asked()
            run.show_step(bar, history[-1], steps)


def compiled(model, cfg):
    """The model's forward pass, compiled if cfg says so."""
    if not cfg.compile:
        return model
    if not cfg.shard:
        return torch.compile(model, fullgraph=True)
    # Sharded weights come and go between one block and the next.
    model.predict = torch.compile(model.predict, fullgraph=True)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True)
    return model


def begin(cfg, corpus, model, optimizer, phases):
    """Open the log of a run. Where it resumes, put its checkpoint into model and optimizer.

    Returns the steps that are done already, a list of run.Step.
    """
    made_by = machine.describe(cfg.device, processes.size()), backend_description(model)
    if not cfg.resume:
        head = run.log_head(vars(cfg), *made_by, corpus.description)
        processes.by_rank_0(lambda: run.start_log(run.log_path(cfg.folder), head))
        return []
    state = checkpoint.load(cfg.folder)
    old_corpus = state["corpus"]["identity"]
    changes = run.changes(state["config"], vars(cfg), old_corpus, corpus.identity)
    what_changes = run.describe_changes(changes)
    processes.all_or_none(lambda: check(
        cfg.allow_changes or not changes.keys() - run.MAY_CHANGE,
        f"{cfg.folder} is another run ({what_changes}): choose another --name, or go on all the "
        "same with --allow_changes"))
    set_recipe(cfg, model, schedule.phase_at(phases, len(state["history"])))
    history = checkpoint.restore(state, model, optimizer)
    optimizer.param_groups[0]["weight_decay"] = cfg.weight_decay
    # The log says for good how the steps so far were made. This head is for one that is lost.
    head = run.log_head(state["config"], *made_by, old_corpus)
    processes.by_rank_0(lambda: run.resume_log(run.log_path(cfg.folder), head, history, changes))
    print(f"{cfg.name} goes on after step {len(history)}; changes: {what_changes or 'none'}")
    return history


def backend_description(model):
    """What computes the quantised products, in words."""
    return model.backend.description if model.backend else "not used"


def announce(cfg, corpus, model, phases):
    n_params = model.config.n_params
    n_others = sum(p.numel() for p in model.parameters()) - n_params
    print(f"{cfg.name}: {n_params:,} parameters and {n_others:,} in embedding and head; "
          f"{schedule.in_words(phases)} of {cfg.batch * cfg.seq:,} tokens of "
          f"{corpus.token_in_words}; "
          f"{cfg.dtype} on {machine.describe(cfg.device, processes.size())}; "
          f"fp4: {backend_description(model)}")


def save(cfg, corpus, model, optimizer, history, log):
    """Write a checkpoint, or raise run.Diverged if a number in it is not finite."""
    row = history[-1]
    is_finite = row.val is None or math.isfinite(row.val)
    state = checkpoint.pack(vars(cfg), corpus, model, optimizer, history)
    if not (is_finite and checkpoint.all_finite(state)):
        diverge(cfg, row, log)
    checkpoint.save(cfg.folder, state, cfg.keep)


def diverge(cfg, row, log):
    """Note in the log that a loss, a gradient or a weight is not finite; raise run.Diverged."""
    val = "" if row.val is None else f" validation loss {row.val},"
    sentence = (f"{cfg.name} has diverged: loss {row.loss},{val} gradient norm {row.norm} at step "
                f"{row.step}, lr {row.lr:.2e}; {checkpoint.last_good(cfg.folder)}")
    log.write(run.log_diverged(sentence))
    raise processes.told_by(0, run.Diverged(sentence))


def finish(cfg, model, corpus, history, spent):
    """Print a sample, then draw the curve, and say where everything is."""
    from tools import generate, report      # Only a finished run needs them.
    try:
        text = generate.sample(model, corpus.vocabulary, ["def"], cfg)[0]
    except UserError as error:          # A sample never ends a run.
        text = f"(no sample: {error})"
    print(f"\n{text}")
    processes.by_rank_0(lambda: report.finish(cfg, history, spent))


# ---- main

def settings_of(state, settings, typed=()):
    """The settings in a checkpoint, but those of settings where they do not define the run, where
    the machine decides, and where they were typed."""
    if any(name in typed for name in run.LENGTHS):
        typed = {*typed, *run.LENGTHS}
    own = {*typed, *run.NOT_IDENTITY, "device", "compile", "gemm"}
    old = {name: value for name, value in state["config"].items() if name not in own}
    try:
        settings = dataclasses.replace(settings, **old)
    except TypeError:                   # There is no such setting here.
        raise UserError("this checkpoint is of another version of quartet.py")
    if "micro" in old:                  # Each of more processes may not have as many sequences.
        micro = processes.fitting(settings.micro, settings.batch)
        settings = dataclasses.replace(settings, micro=micro)
    # What a file says is checked as if it had been typed.
    return resolve(parse(cli.to_flags(settings)))


def continued(cfg, settings, typed):
    """The settings with which the run of cfg goes on, or None if there is nothing left to do.

    Without a checkpoint the run begins anew. Of several processes only rank 0 calls this.
    """
    is_finished = run.is_finished(cfg.folder)
    if not checkpoint.exists(cfg.folder):
        if is_finished:
            print(f"{cfg.name} is finished, and its checkpoint is removed")
            return None
        print(f"there is no checkpoint in {cfg.folder}: {cfg.name} begins anew")
        return dataclasses.replace(cfg, resume=False)
    state = checkpoint.load_newest(cfg.folder)
    cfg = settings_of(state, dataclasses.replace(settings, name=cfg.name), typed)
    n_params = PRESETS[cfg.size].n_params
    steps = schedule.n_steps(cfg, n_params)
    done = len(state["history"])
    is_evaluated = run.Step(*state["history"][-1]).val is not None
    check(done < steps or done == steps and is_evaluated,
          f"{cfg.folder} has {done} steps already: give --steps {done + 1} or more")
    schedule.check_longer(settings_of(state, settings), cfg, n_params, done)
    is_another = run.changes(state["config"], vars(cfg)).keys() - run.MAY_CHANGE
    if done == steps and not is_another and is_finished:
        print(f"{cfg.name} is finished after {done} steps; --resume --steps N makes it longer")
        return None
    return cfg


def expand_runs(settings):
    """The settings of each run that a command line means, seed by seed."""
    return map(resolve, schedule.expand(settings))


def main(argv):
    settings = parse(argv)
    with processes.joined(settings.device):
        configs = processes.all_or_none(lambda: plan(settings))
        if settings.sample is not None:
            from tools import generate  # Only sampling needs it.
            print(generate.from_checkpoint(configs[0], settings_of, build_model))
        elif len(configs) == 1:
            cfg = configs[0]
            if cfg.resume:
                typed = cli.given(Settings, argv)
                cfg = processes.by_rank_0(lambda: continued(cfg, settings, typed))
            if cfg:
                train(cfg)
        else:
            from tools import ablation  # Only several runs need it.
            label = run.label(vars(settings)).replace(",", "-")
            name = settings.name or f"{configs[0].size}-{label}"[:100]
            ablation.compare(configs, os.path.join(settings.out, name), train, sys.argv[0])


def plan(settings):
    """The settings of each run that a command line means; what cannot be done is refused."""
    configs = list(dict.fromkeys(expand_runs(settings)))
    is_one = len(configs) == 1
    check(is_one or settings.sample is None, "--sample is for one run: name it with --name")
    check(is_one or not settings.resume,
          "--resume is for one run: several go on with the same command without it")
    check(not settings.shard or cli.is_one_of_many(),
          "--shard spreads a model over processes: start them with torchrun")
    if configs[0].device == "cpu" and settings.device is None:
        machine.tell_why_on_cpu()
    if settings.name is None and not settings.resume and settings.sample is None:
        remedy = "give this one a --name, or --resume" if is_one else "give these a --name"
        for cfg in configs:
            run.refuse_other(cfg.folder, vars(cfg), remedy)
    return configs


def run_cli(argv, main=main):
    """main(argv), in which a mistake of the user ends in one sentence; returns the exit code."""
    with signals.become_exceptions():
        return processes.leave(cli.run(main, argv))


if __name__ == "__main__":
    sys.exit(run_cli(sys.argv[1:]))
