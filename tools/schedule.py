"""
Which runs a command line means, how long a run is, and which recipe each of its steps has: with
--switch, the last ones have another than the first.

    --switch 0.8:fp4-bwd                        from 80 % of the steps on with the row fp4-bwd
    --switch 0.8:fp4+post_step=cage+scale=mse   with the row fp4, two of its columns changed

The first steps have the row of --precision with the axes that are given beside it (--scale ...),
the last ones only what the switch says. So a model that was trained in high precision can end in
4 bits, which is quantisation-aware training with its compute split in two (arXiv 2509.22935), or
the other way round: NVIDIA proposes to end in BF16 what was trained in NVFP4 (arXiv 2509.25149).
Weights, the optimizer's moments and the learning rate go on as they are.

Of S steps, the first round(SHARE * S) belong to the first phase, where round() is Python's: .5 goes
to the even number. Which recipe a step has thus follows from the share and the length of the run
alone, wherever it is stopped and resumed. A model is always in the phase of its last step: what is
saved or evaluated between the two phases still belongs to the first.

This module does not depend on the trainer: the settings cfg are any dataclass that has its fields.
"""
import dataclasses
import itertools
import math
from typing import NamedTuple

from data.files import check, checked
from fp4.axes import AXES, recipe, variant_name
from fp4.recipes import RECIPES, Recipe
from tools.cli import LARGEST_INT
from tools.run import check_length, label

MAX_RUNS = 10_000                       # of one command line
# The axes that have a value which means that nothing is done.
MAY_BE_NEEDLESS = ("multiplier", "mean_split", "post_step", "down_input")


class Phase(NamedTuple):
    """A part of a run that has one recipe."""
    begin: int                          # the number of steps before it
    end: int                            # the number of steps when it is over
    steps: int                          # of the whole run
    cfg: object                         # the settings of its steps, which have no switch
    recipe: Recipe


# ---- a switch as text

def listed(axis, text):
    """The values in a comma list; [None] where there is none. A run without a switch is none in
    a list of them, as in --switch none,0.8:fp4-bwd."""
    if text is None:
        return [None]
    values = [value.strip() for value in text.split(",")]
    return [None if axis == "switch" and value == "none" else value for value in values]


def parse(word):
    """The share of the first phase, and the settings of the second: {"precision": ..., axis: ...}.

    Raises UserError for what is not SHARE:ROW+AXIS=VALUE+...; recipe_of() checks the row and its
    axes.
    """
    share, _, row = word.partition(":")
    form = f"switch {word!r} is not SHARE:ROW or SHARE:ROW+AXIS=VALUE, such as 0.8:fp4+scale=mse"
    try:
        share = float(share)
    except ValueError:
        share = None
    check(share is not None and row, form)
    check(0 < share < 1, f"switch {word!r}: the share has to be more than 0 and less than 1")
    precision, *changes = row.split("+")
    settings = {"precision": precision, **dict.fromkeys(AXES)}
    for change in changes:
        axis, equals, value = change.partition("=")
        check(equals, form)
        check(axis in AXES, f"switch {word!r}: {axis!r} is not one of {', '.join(AXES)}")
        settings[axis] = value
    return share, settings


# ---- the runs of a command line

def expand(settings):
    """Yields the settings of each run that a command line with comma lists means, seed by seed."""
    lists = {axis: getattr(settings, axis) for axis in ("precision", *AXES, "switch")}
    if settings.precision == "all":
        lists["precision"] = ",".join(RECIPES)
    choices = [listed(*item) for item in lists.items()]
    n_runs = settings.seeds * math.prod(map(len, choices))
    check(n_runs <= MAX_RUNS, f"these are {n_runs:,} runs, more than {MAX_RUNS:,}")
    check(settings.seed + settings.seeds - 1 <= LARGEST_INT, "the last seed is too large")
    seeds = range(settings.seed, settings.seed + settings.seeds)
    for seed, *values in itertools.product(seeds, *choices):
        cfg = dataclasses.replace(settings, seed=seed, seeds=1, **dict(zip(lists, values)))
        cfg = without_needless_axes(cfg)
        if settings.name is not None and n_runs > 1:
            cfg = dataclasses.replace(cfg, name=f"{settings.name}-{label(vars(cfg))}")
        yield cfg


def without_needless_axes(cfg):
    """The settings without what leaves the row as it is, such as --post_step none, so that the row
    fp4 is called fp4 in a list of what changes it, too."""
    for axis in MAY_BE_NEEDLESS:
        other = dataclasses.replace(cfg, **{axis: None})
        if cfg != other and recipe_of(cfg) == recipe_of(other):
            cfg = other
    return cfg


# ---- the recipes of a run

def recipe_of(cfg):
    """The row of the table that the settings name, with the columns that they change. Of a run with
    a switch, it is that of the first phase. Raises UserError if there is no such row."""
    axes = {axis: getattr(cfg, axis) for axis in AXES}
    return checked(recipe, cfg.precision, **axes)


def settings_of(cfg):
    """The settings of each phase, which have no switch."""
    first = dataclasses.replace(cfg, switch=None)
    if cfg.switch is None:
        return [first]
    _, row = parse(cfg.switch)
    return [first, dataclasses.replace(first, **row)]


def recipes_of(cfg):
    """The recipe of each phase."""
    return [recipe_of(phase) for phase in settings_of(cfg)]


# ---- its steps

def n_steps(cfg, n_params):
    """Length of a run in steps; cfg gives it in steps, in tokens or in tokens per parameter."""
    n_tokens = cfg.tokens or (cfg.tokens_per_param or 0) * n_params
    return cfg.steps or int(n_tokens // (cfg.batch * cfg.seq))


def ends_of(cfg, steps):
    """The number of steps when each phase is over."""
    if cfg.switch is None:
        return [steps]
    share, _ = parse(cfg.switch)
    return [round(share * steps), steps]


def phases_of(cfg, n_params):
    """The Phases of a run of a model with so many parameters. Raises UserError if one of them
    cannot be trained."""
    steps = n_steps(cfg, n_params)
    check_length(steps, cfg.batch * cfg.seq)
    ends = ends_of(cfg, steps)
    begins = [0, *ends[:-1]]
    phases = [Phase(begin, end, steps, settings, recipe_of(settings))
              for begin, end, settings in zip(begins, ends, settings_of(cfg))]
    for phase in phases:
        check(phase.begin < phase.end,
              f"switch {cfg.switch!r} comes after step {ends[0]} of {steps}, and each phase needs "
              "a step: give another share, or more steps")
        checked(phase.recipe.check_run, steps, cfg.shard, phase.begin, phase.end)
    forms = list(dict.fromkeys(forms_of(phase.recipe) for phase in phases))
    check(not cfg.shard or len(forms) == 1,
          f"switch {cfg.switch!r}: with --shard weights travel as {' and then as '.join(forms)}, "
          "and cannot change from one to the other: leave out --shard or the switch")
    return phases


def forms_of(recipe):
    """In which forms the weights of a sharded model travel (fp4/sharded.py), in words."""
    return " and ".join(dict.fromkeys((recipe.travels_as, recipe.down.travels_as)))


def in_words(phases):
    """The number of steps, and where another recipe begins: 350 steps (280 of fp4, 70 of bf16)."""
    names = [variant_name(phase.cfg.precision, vars(phase.cfg)) for phase in phases]
    shares = [f"{phase.end - phase.begin:,} of {name}" for phase, name in zip(phases, names)]
    about = f" ({', '.join(shares)})" if len(phases) > 1 else ""
    return f"{phases[-1].end:,} steps{about}"


def phase_at(phases, done):
    """The Phase of a model after so many steps."""
    return next((phase for phase in phases if done <= phase.end), phases[-1])


def settings_at(cfg, presets, done):
    """The settings of a run's model after so many steps, on its own: with the row of that phase,
    and in one process. presets are those of model.py."""
    whole = dataclasses.replace(cfg, shard=False)
    phases = phases_of(whole, presets[cfg.size].n_params)
    return phase_at(phases, done).cfg


def check_longer(old, new, n_params, done):
    """Refuses to go on with a run whose length changes where a step that is trained already would
    have had the recipe of the other phase.

    old, new    settings of the run so far, and from now on
    done        the number of steps that are trained
    """
    steps = n_steps(new, n_params)
    before = ends_of(new, n_steps(old, n_params))[0]
    after = ends_of(new, steps)[0]
    check(min(done, before) == min(done, after),
          f"{done} steps are trained, with --switch after step {before}; in a run of {steps} steps "
          f"it would have come after step {after}: give another length")
