"""
The axes: what a run, or a comparison of runs, can change in its row of the table of recipes.

    recipe("fp4", scale="nearest")                  --precision fp4 --scale nearest
    recipe("fp4", rotation="32:none:128")           --precision fp4 --rotation 32:none:128

The first columns of GemmSpec are axes. A single value changes the products named at CHANGES below;
three values are for forward, dgrad and wgrad. Of a column of PER_OPERAND, a value can be two: what
stands left of a slash is for the left operand of the product, what stands right of it for the right
one. In the forward product these are the activations and the weights:

    recipe("fp4", scale="mse/floor")                --precision fp4 --scale mse/floor
"""
from .check import check
from .recipes import (
    ABSMAX, DOWN_INPUTS, PER_OPERAND, POST_STEPS, QUEST, QUEST_RULES, RECIPES, SCALE_RULES, Number,
    Recipe, parse_number, parse_post_step)

ALL_SCALE_RULES = dict.fromkeys(rule for rules in SCALE_RULES.values() for rule in rules)

MULTIPLIER = Number("NUMBER", 1., .1, 10)       # Beyond, most values would clip or be zeros.

# What a run can change in its row, each an axis of an ablation: seven columns, with their values;
# three switches, which quantise a product or leave it out; and the two columns of the whole row.
AXES = {
    "format":   tuple(SCALE_RULES),
    "scale":    (*ALL_SCALE_RULES, "quest-floor", "quest-nearest"),
    "multiplier": (MULTIPLIER.name,),
    "rotation": ("none", "16", "32", "64", "128"),
    "signs":    ("before", "after", "none"),
    "rounding": ("nearest", "stochastic", "eden", "rtn", "sr"),
    "mean_split": ("on", "off"),
    "forward":  ("on", "off"),
    "dgrad":    ("on", "off"),
    "wgrad":    ("on", "off"),
    "post_step": tuple(POST_STEPS),
    "down_input": DOWN_INPUTS,
}
# Other names for some of the values.
SYNONYMS = {
    "quest-floor": "floor",
    "quest-nearest": "nearest",
    "rtn": "nearest",
    "sr": "stochastic",
}
# The products that a single value changes; three values are for forward, dgrad and wgrad. So one
# rounding is that of the backward products, and EDEN in the forward product alone is --rounding
# eden:nearest:nearest.
CHANGES = {
    "format":   ("forward", "dgrad", "wgrad"),
    "scale":    ("forward",),
    "multiplier": ("forward",),
    "rotation": ("forward", "dgrad", "wgrad"),
    "signs":    ("dgrad", "wgrad"),
    "rounding": ("dgrad", "wgrad"),
    "mean_split": ("forward", "dgrad", "wgrad"),
}
# What a product becomes when it is switched on, and when it changes to format mxfp4.
DEFAULTS = {"forward": QUEST, "dgrad": ABSMAX, "wgrad": ABSMAX}


def recipe(precision, **axes):
    """Returns the row `precision` with the given axes changed; None leaves one as it is.

    Raises a ValueError that says in a sentence what is wrong with them.
    """
    check(precision in RECIPES, f"precision {precision!r} is not one of {', '.join(RECIPES)}")
    row = RECIPES[precision]
    axes = {axis: value for axis, value in axes.items() if value is not None}
    for axis, value in axes.items():
        check_value(axis, value)
    check(not (row.method and axes),
          f"{precision} is a method of its own and has no {', '.join(axes)} to change")

    products = {name: switch_product(name, row, axes) for name in DEFAULTS}
    for axis in CHANGES:
        if axis not in axes:
            continue
        changes = split_value(axis, axes[axis], products)
        left = " left" if len(axes) > 1 else ""
        check(changes, f"{precision} has no quantised product{left} whose {axis} could change")
        for name, value in changes.items():
            products[name] = change_product(name, products[name], axis, value)

    for name, spec in products.items():
        if spec is not None:
            validate(name, spec)
    post_step = axes.get("post_step", row.post_step)
    validate_post_step(precision, post_step, products["forward"])
    down_input = axes.get("down_input", row.down_input)
    changed = Recipe(*products.values(), row.method, post_step, down_input)
    validate_down_input(precision, changed)
    return changed


def check_value(axis, value):
    """Checks that an axis exists and has this value, or these three, or two for the operands."""
    check(axis in AXES, f"{axis} {value!r} is not one of {', '.join(AXES)}")
    if axis == "post_step":
        parse_post_step(value)
        return
    values = str(value).split(":")
    for v in values:
        check_word(axis, v)
    may_be_three = axis in CHANGES
    counts = (1, 3) if may_be_three else (1,)
    or_three = " or three, forward:dgrad:wgrad" if may_be_three else ""
    check(len(values) in counts, f"{axis} {value!r}: give one value{or_three}")


def check_word(axis, word):
    """Checks one value of an axis, or the two of the operands."""
    words = word.split("/") if axis in PER_OPERAND else [word]
    check(len(words) <= 2, f"{axis} {word!r}: give one value, or two for the operands, left/right")
    for w in words:
        if axis == "multiplier":
            parse_number(w, MULTIPLIER, f"multiplier {word!r}")
            continue
        check(w in AXES[axis], f"{axis} {w!r} is not one of {', '.join(AXES[axis])}")


def switch_product(name, row, axes):
    """Returns the product `name` of a row, switched on or off if the axis of that name says so."""
    spec = getattr(row, name)
    switch = axes.get(name)
    if switch == "off":
        return None
    if switch == "on" and spec is None:
        return DEFAULTS[name]
    return spec


def split_value(axis, value, products):
    """Returns {product: value} for the quantised products that an axis changes."""
    values = str(value).split(":")
    if len(values) == 3:
        pairs = dict(zip(DEFAULTS, values))
    else:
        pairs = dict.fromkeys(CHANGES[axis], values[0])
    return {name: v for name, v in pairs.items() if products[name] is not None}


def change_product(name, spec, axis, value):
    """Returns a product with one column changed, and with it the columns that cannot stay."""
    if axis == "rotation":
        size = 0 if value == "none" else int(value)
        spec = spec._replace(rotation=size)
        return spec if size else spec._replace(signs="none")
    if axis == "mean_split":
        return spec._replace(mean_split=value == "on")
    if axis not in PER_OPERAND:
        return spec._replace(**{axis: SYNONYMS.get(value, value)})
    left, _, right = value.partition("/")
    return spec.with_operands(change_operand(name, spec.left, axis, left),
                              change_operand(name, spec.right, axis, right or left))


def change_operand(name, spec, axis, value):
    """Returns the spec of one operand with a column changed, and a scale rule of its format."""
    value = float(value) if axis == "multiplier" else SYNONYMS.get(value, value)
    spec = spec._replace(**{axis: value})
    if axis == "format" and spec.scale not in SCALE_RULES[value]:
        rule = DEFAULTS[name].scale if value == "mxfp4" else SCALE_RULES[value][0]
        spec = spec._replace(scale=rule)
    return spec


def validate(product_name, spec):
    """Raises ValueError for a combination of columns that means nothing."""
    def refuse_if(condition, sentence):
        check(not condition, f"{product_name}: {sentence}")

    differ = spec != spec.left
    taken_over = "weight" if product_name == "dgrad" else "input"
    as_it_is = f"this row multiplies with the forward product's {taken_over} as it is, which "
    refuse_if(differ and spec.rhs == "reuse", as_it_is + "cannot have a format or scale of its own")
    refuse_if(spec.rotation != 0 and spec.rhs == "reuse",
              as_it_is + "cannot be rotated along another axis")

    sides = {"left operand, ": spec.left, "right operand, ": spec.right}
    for side, operand in (sides if differ else {"": spec.left}).items():
        problem = problem_of_scale(operand)
        refuse_if(problem, f"{side}{problem}")
    refuse_if(spec.rotation == 0 and spec.signs != "none",
              f"random signs {spec.signs} a rotation need a rotation")

    is_eden = spec.rounding == "eden"
    # The forward product can do with a bias: it wants the least error.
    wants_no_bias = product_name != "forward"
    refuse_if(is_eden and wants_no_bias and spec.signs != "before",
              "rounding eden is unbiased only behind a random rotation: signs before")
    refuse_if(is_eden and spec.rhs == "square_blocks" and spec.right.format != "nvfp4",
              f"square blocks of {spec.right.format} have no rounding eden")


def problem_of_scale(spec):
    """Returns what is wrong with the scale rule in the spec of one operand, or ""."""
    rules = SCALE_RULES[spec.format]
    if spec.scale not in rules:
        return f"scale {spec.scale!r} is not one of format {spec.format}'s: {', '.join(rules)}"
    if spec.multiplier != 1 and spec.scale not in QUEST_RULES:
        return f"a multiplier is for the scales {' and '.join(QUEST_RULES)}, not for {spec.scale}"
    if spec.rounding != "nearest" and spec.scale == "four-six":
        return f"scale four-six chooses by the error, which makes rounding {spec.rounding} biased"
    clips_or_corrects = spec.scale != "absmax34" and spec.format not in ("nvfp4", "int4")
    if spec.rounding == "stochastic" and clips_or_corrects:
        return ("stochastic rounding is unbiased only where the scale neither clips nor corrects, "
                f"and {spec.scale} of {spec.format} does")
    return ""


def validate_post_step(precision, word, forward):
    """Raises ValueError unless the weight has a grid, which stays the same from step to step."""
    name, *_ = parse_post_step(word)
    if name == "none":
        return
    check(forward is not None,
          f"post_step {name} needs a quantised forward product, and {precision} has none")
    check(forward.right.is_fixed,
          f"post_step {name} needs a grid that stays: a forward product without random signs and "
          "random rounding")


def validate_down_input(precision, row):
    """Raises ValueError unless the forward product has an input whose format can change."""
    word = row.down_input
    if word == "none":
        return
    check(row.forward is not None,
          f"down_input {word} needs a quantised forward product, and {precision} has none")
    check(row.forward.left.format != word,
          f"down_input {word} changes nothing where the input of every layer has this format")
    validate("forward", row.down.forward)


def variant_name(precision, axes):
    """Returns the name of a row with changed axes, such as "fp4-nearest-rotation-128".

    A value stands alone if it says which axis it belongs to: a scale always does, any other only if
    it is a word that no second axis has. The name is one of a folder, so that a slash becomes a +.
    """
    parts = [precision]
    for axis, choices in AXES.items():
        value = axes.get(axis)
        if not value:
            continue
        value = value.replace("/", "+")
        # Without down_input, whose values are formats, too.
        axes_with_value = sum(value in AXES[other] for other in AXES if other != "down_input")
        is_clear = axis == "scale" or (not value.isdigit() and axes_with_value == 1)
        is_clear = is_clear and axis != "down_input"
        parts.append(value if is_clear else f"{axis}-{value}")
    return "-".join(parts)
