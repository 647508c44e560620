"""Draws the figures of analysis.diagnose, each from the data in its JSON."""

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure  # not pyplot, whose state is the caller's

CURVES = 6  # sources drawn against t, those with the largest weights


def states(data: dict) -> Figure:
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    titles = "RMS of the state", "RMS of the loss gradient", "cosine with the next state"
    for panel, name, title in zip(panels, ("rms", "gradient_rms", "cosine"), titles):
        rows = np.array(data[name], dtype=float)
        curves(panel, data["blocks"][: rows.shape[1]], rows, data["times"], title, "after block")
        if name != "cosine" and (rows > 0).any():
            panel.set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def routing(data: dict) -> Figure:
    times, sources, count = data["times"], data["sources"], len(data["sources"])
    figure = Figure(figsize=(max(15, 3.2 * len(times)), 8), layout="constrained")
    above, below = figure.subfigures(2, 1)
    name = "share of importance" if "importance" in data else "weight"
    panels = above.subplots(1, len(times), squeeze=False, sharey=True)[0]
    for panel, t, rows in zip(panels, times, data["weights"]):
        image = np.full((count, count), np.nan)
        for row, read, values in zip(image, sources, rows):
            row[read] = np.array(values, dtype=float)
        drawn = panel.imshow(image, vmin=0, vmax=1, aspect="auto", extent=(-0.5, count - 0.5, count + 0.5, 0.5))
        panel.set(title=f"t = {t:g}", xlabel="source")
    panels[0].set_ylabel("reader (last: head)")
    above.colorbar(drawn, ax=panels, label=name)

    panels = below.subplots(1, 5)
    for panel, reader in zip(panels, (count // 3, 2 * count // 3, count)):
        weights = np.array([rows[reader - 1] for rows in data["weights"]], dtype=float)  # (times, n)
        for i in np.sort(np.argsort(-weights.mean(0), kind="stable")[:CURVES]):
            panel.plot(times, weights[:, i], marker="o", markersize=2.5, label=f"v{sources[reader - 1][i]}")
        panel.set(title=f"reader {reader}", xlabel="t", ylabel=name)
        panel.legend(fontsize="small")
    readers = range(1, count + 1)
    curves(panels[3], readers, data["entropy_share"], times, "entropy / log n", "reader")
    curves(panels[4], readers, data["largest"], times, "largest weight", "reader")
    panels[4].legend(fontsize="small")
    return figure


def time(data: dict) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    panel.plot(data["readers"], data["r2"], marker="o", markersize=3)
    label(panel, xlabel="reader (last: head)", ylabel="R² of t on held-out images")
    return figure


def alignment(data: dict) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels, blocks, times = figure.subplots(1, 2), data["blocks"], data["times"]
    curves(panels[0], blocks, data["cknna"], times, f"CKNNA, k = {data['neighbours']}", "after block")
    curves(panels[1], blocks, data["accuracy"], times, "accuracy of a linear probe", "after block")
    panels[1].axhline(data["encoder_accuracy"], color="black", linestyle="--", label="encoder")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right center")
    return figure


def curves(panel, x, rows, times, title, xlabel):
    """One line for each time, dark (data) to light (noise); None leaves a gap."""
    for t, row in zip(times, np.array(rows, dtype=float)):
        panel.plot(x, row, marker="o", markersize=2.5, color=colormaps["viridis"](0.9 * t), label=f"t = {t:g}")
    label(panel, title=title, xlabel=xlabel)


def label(panel, **texts):
    panel.set(**texts)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.3)
