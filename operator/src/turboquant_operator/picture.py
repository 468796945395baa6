"""Edge: the capacity picture of `tq plan --picture`. Needs matplotlib (extra `picture`)."""

from pathlib import Path

from turboquant_operator.api.status import Plan


def draw_capacity(plan: Plan, title: str, wanted: int, path: Path) -> None:
    """Writes a bar chart of tokens per format at the plan's tensor-parallel size, with the asked capacity.

    The suffix of `path` names the format (png, svg, pdf). Raises ValueError for one that matplotlib lacks,
    OSError where the file cannot be written, ModuleNotFoundError without matplotlib.
    """
    # Imported here: it is an extra, and takes a second that a plan without a picture need not wait.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tokens = {plan.format: plan.predicted_tokens} | {
        other.format: other.predicted_tokens
        for other in plan.alternatives
        if other.tensor_parallel_size == plan.tensor_parallel_size
    }
    names = sorted(tokens, key=lambda name: tokens[name])
    figure = Figure(figsize=(7, 0.6 * len(names) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = ["tab:blue" if name == plan.format else "tab:gray" for name in names]
    bars = axes.barh(names, [tokens[name] for name in names], color=colors)
    axes.bar_label(bars, [f"{tokens[name]:,}" for name in names], padding=3)
    axes.axvline(wanted, color="tab:red", linestyle="--", label=f"asked for: {wanted:,}")
    axes.set_xlabel("tokens in the KV cache of one replica")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0.2)
    axes.set_title(title)
    axes.legend(loc="lower right")
    figure.savefig(path)
