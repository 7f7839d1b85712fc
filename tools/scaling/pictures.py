"""The law and the regions as pictures. Each function returns a sentence: where the picture is, or why there is none."""
import os
import numpy as np
from scaling import fitting, law, regions
from scaling.advise import human

# of the four precisions, in the order of the table: grey, orange, blue, green
COLORS = np.array([(.85, .85, .85), (.96, .77, .56), (.66, .81, .91), (.65, .85, .63)])


def picture(path, size, panels, draw):
    """draw(plots) into path"""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError: return "(no picture: matplotlib is not installed)"
    figure = Figure(figsize=size, layout="constrained")
    draw(np.ravel(figure.subplots(1, panels, sharey=True)))
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        with rc_context({"svg.fonttype": "none"}): figure.savefig(path)         # letters as letters: half the size
    except ValueError as error: return f"(no picture: {error})"  # a kind of file that matplotlib does not know
    return f"picture: {path}"


def law_picture(path, runs, base, methods):
    """loss against tokens, a line a size with its 90 % interval: BF16, and of those quantised whole the most-run"""
    whole = max((m for m in methods if "BF16" not in m), key=lambda m: len(runs[m][0]), default=None)
    drawn = [(law.BF16, base, "0.3")] + ([(whole, fitting.compose(base, methods, *whole), "C3")] if whole else [])

    def draw(plots):
        for method, fit, color in drawn:
            n, d, _ = runs[method]
            plots[0].plot(np.exp(d), np.exp(runs[method][2]), ".", color=color, label=" : ".join(method))
            for size in sorted(set(n)):
                of_size = d[n == size]
                d_line = np.linspace(min(of_size) - .2, max(of_size) + .2, 30)
                loss, low, high = fitting.predict(fit, np.full(30, size), d_line)
                plots[0].plot(np.exp(d_line), loss, color=color, linewidth=1)
                plots[0].fill_between(np.exp(d_line), low, high, color=color, alpha=.15, linewidth=0)
                end = np.exp(d_line[-1]), loss[-1]
                plots[0].annotate(human(np.exp(size)), end, color=color, fontsize=7, va="center")
        plots[0].set(xscale="log", xlabel="tokens", ylabel="validation loss")
        plots[0].legend()
    return picture(path, (7, 4), 1, draw)


def region_picture(path, panels, tables, runs):
    """the best precision over model size and tokens per parameter, a panel for each set of speeds"""
    sizes, ratios = np.geomspace(1e8, 1e11, 200), np.geomspace(25, 2600, 200)
    N, ratio = (x.ravel() for x in np.meshgrid(sizes, ratios))
    n, d, _ = runs[law.BF16]

    def draw(plots):
        for plot, speeds, table in zip(plots, panels, tables):
            best = regions.losses(table, speeds, N, N * ratio).argmin(0).reshape(200, 200)
            plot.pcolormesh(sizes, ratios, COLORS[best], rasterized=True)
            for i in set(best.ravel()):
                where = np.argwhere(best == i)
                y, x = where[((where - where.mean(0)) ** 2).sum(1).argmin()]
                plot.text(sizes[x], ratios[y], table[i].name, ha="center", va="top", fontsize=9)
            for name, (params, tokens) in regions.MODELS.items():
                left = name not in ("Gemma 3 1B", "Gemma 3 12B")                # the others have something on their right
                plot.plot(params, tokens / params, "k.")
                plot.annotate(name, (params, tokens / params), fontsize=6, va="center", ha="right" if left else "left",
                              xytext=(-4 if left else 4, 0), textcoords="offset points")
            plot.fill_between(np.exp([min(n), max(n)]), *np.exp([min(d - n), max(d - n)]),
                              facecolor="none", edgecolor="k", linestyle=":", label="runs of the fit")
            plot.set(xscale="log", yscale="log", xlim=(1e8, 1e11), ylim=(25, 2600), xlabel="parameters")
            plot.set_title(f"{speeds.name}\n{speeds.source}", fontsize=7)
        plots[0].set_ylabel("tokens per parameter")
        plots[0].legend(loc="lower right", fontsize=7)
    return picture(path, (4.2 * len(panels) + .5, 4), len(panels), draw)
