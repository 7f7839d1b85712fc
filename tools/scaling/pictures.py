"""
Draws the law and the regions.

The two functions law_picture and region_picture return a sentence: where the picture is, or why
there is none.
"""
import os

import numpy as np

from tools.scaling import fitting, law, regions
from tools.scaling.advise import format_count

# Of the four precisions, in the order of regions.four_precisions.
COLORS = np.array([
    (.85, .85, .85),                    # grey
    (.96, .77, .56),                    # orange
    (.66, .81, .91),                    # blue
    (.65, .85, .63),                    # green
])
# The axes of the regions: parameters, and tokens per parameter.
SIZES = np.geomspace(1e8, 1e11, 200)
RATIOS = np.geomspace(25, 2600, 200)
# The other models have a neighbour on their right, and their names stand on the left.
LABELS_ON_THE_RIGHT = ("Gemma 3 1B", "Gemma 3 12B")


def save_picture(path, size, panels, draw):
    """Calls draw(plots) on a row of empty panels, and saves it; size is in inches."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return "(no picture: matplotlib is not installed)"
    figure = Figure(figsize=size, layout="constrained")
    draw(np.ravel(figure.subplots(1, panels, sharey=True)))
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        # Letters stay letters instead of becoming outlines, which halves the file.
        with rc_context({"svg.fonttype": "none"}):
            figure.savefig(path)
    except ValueError as error:         # matplotlib does not know this kind of file.
        return f"(no picture: {error})"
    return f"picture: {path}"


# ---- the law

def law_picture(path, runs, base, methods):
    """
    Draws the loss against the tokens, with a line and its 90 % interval for each size: of BF16,
    and of the method with the most runs among those that quantise both passes.
    """
    quantised = [method for method in methods if "BF16" not in method]
    most_run = max(quantised, key=lambda method: len(runs[method][0]), default=None)

    def draw(plots):
        [plot] = plots
        draw_method(plot, law.BF16, runs, base, "0.3")
        if most_run:
            fit = fitting.compose(base, methods, *most_run)
            draw_method(plot, most_run, runs, fit, "C3")
        plot.set(xscale="log", xlabel="tokens", ylabel="validation loss")
        plot.legend()
    return save_picture(path, (7, 4), 1, draw)


def draw_method(plot, method, runs, fit, color):
    """Draws the runs of one method as points, and its law as a line for each size."""
    n, d, y = runs[method]
    plot.plot(np.exp(d), np.exp(y), ".", color=color, label=" : ".join(method))
    for size in sorted(set(n)):
        of_size = d[n == size]
        line_d = np.linspace(min(of_size) - .2, max(of_size) + .2, 30)
        loss, low, high = fitting.predict(fit, np.full(30, size), line_d)
        tokens = np.exp(line_d)
        plot.plot(tokens, loss, color=color, linewidth=1)
        plot.fill_between(tokens, low, high, color=color, alpha=.15, linewidth=0)
        plot.annotate(format_count(np.exp(size)), (tokens[-1], loss[-1]), color=color, fontsize=7,
                      va="center")


# ---- the regions

def region_picture(path, panels, tables, runs):
    """
    Draws which precision is best over model size and tokens per parameter.

    panels are the Speeds of the machines, a panel each, and tables their lists of precisions.
    """
    def draw(plots):
        for plot, speeds, precisions in zip(plots, panels, tables):
            draw_regions(plot, speeds, precisions)
            draw_models(plot)
            draw_extent_of_runs(plot, runs)
            plot.set(
                xscale="log",
                yscale="log",
                xlim=(1e8, 1e11),
                ylim=(25, 2600),
                xlabel="parameters",
            )
            plot.set_title(f"{speeds.name}\n{speeds.source}", fontsize=7)
        plots[0].set_ylabel("tokens per parameter")
        plots[0].legend(loc="lower right", fontsize=7)
    width = 4.2 * len(panels) + .5
    return save_picture(path, (width, 4), len(panels), draw)


def draw_regions(plot, speeds, precisions):
    """Colours each point of the map by its best precision, and names each region once."""
    N, ratio = (grid.ravel() for grid in np.meshgrid(SIZES, RATIOS))
    losses = regions.log_losses(precisions, speeds, N, N * ratio)
    best = losses.argmin(0).reshape(len(RATIOS), len(SIZES))
    plot.pcolormesh(SIZES, RATIOS, COLORS[best], rasterized=True)
    for i in set(best.ravel()):
        points = np.argwhere(best == i)
        # The name goes to the point of the region that is nearest to its centre.
        distance = ((points - points.mean(0)) ** 2).sum(1)
        y, x = points[distance.argmin()]
        plot.text(SIZES[x], RATIOS[y], precisions[i].name, ha="center", va="top", fontsize=9)


def draw_models(plot):
    """Marks well-known models where they were trained."""
    for name, (params, tokens) in regions.MODELS.items():
        place = (params, tokens / params)
        if name in LABELS_ON_THE_RIGHT:
            side, offset = "left", 4
        else:
            side, offset = "right", -4
        plot.plot(*place, "k.")
        plot.annotate(name, place, fontsize=6, va="center", ha=side, xytext=(offset, 0),
                      textcoords="offset points")


def draw_extent_of_runs(plot, runs):
    """Outlines where the runs lie that the law was fitted to."""
    n, d, _ = runs[law.BF16]
    sizes = np.exp([min(n), max(n)])
    lowest, highest = np.exp([min(d - n), max(d - n)])
    plot.fill_between(sizes, lowest, highest, facecolor="none", edgecolor="k", linestyle=":",
                      label="runs of the fit")
