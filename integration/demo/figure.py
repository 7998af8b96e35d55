"""The picture of a demo run: the loss curve, and accuracy before and after."""

from pathlib import Path
from typing import Any

INK, SOFT, BLUE, GREY = "#1f2933", "#7b8794", "#2b6cb0", "#cbd2d9"


def draw(numbers: dict[str, Any], file: Path) -> None:
    """Write the PNG.

    Args:
        numbers: what `integration.demo` measured: loss, before, merged_torch, onnx, always_earn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "axes.edgecolor": GREY, "text.color": INK, "axes.labelcolor": INK})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), width_ratios=(3, 2))

    steps = [entry["step"] for entry in numbers["loss"]]
    left.plot(steps, [entry["loss"] for entry in numbers["loss"]], color=BLUE, linewidth=2)
    left.set(title="Training loss", xlabel="step", ylim=(0, None))
    left.grid(axis="y", color=GREY, linewidth=0.5)

    names = ("before", "merged,\ntorch", "merged,\nONNX")
    values = [numbers[key]["accuracy"] for key in ("before", "merged_torch", "onnx")]
    bars = right.bar(names, values, color=(GREY, BLUE, BLUE), width=0.6)
    right.bar_label(bars, [f"{value:.3f}" for value in values], padding=3, color=INK)
    right.axhline(numbers["always_earn"], color=SOFT, linewidth=1, linestyle="--")
    right.text(-0.42, numbers["always_earn"] + 0.02, "most frequent topic", color=SOFT, fontsize=8)
    right.set(title=f"Accuracy on {numbers['stories']} held-out stories", ylim=(0, 1.1))

    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(color=GREY, labelcolor=INK)
    figure.suptitle("SmolLM2-135M at 4 bits, QA-BLoRA on Reuters R8", fontweight="bold", x=0.02, ha="left")
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
