"""`plot`: the loss curves of a run as a PNG, from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

from data.errors import InputError
from pretrain.tracking.metric_log import read_metrics


def plot(run: str, output: str = "") -> Path:
    """Draws training loss, cross-entropy and validation NELBO (with two standard errors) of the run folder; returns the file."""
    folder = Path(run)
    lines = list(read_metrics(folder))
    train = [
        (m["step"], m["train/loss"], m["train/ce_loss"]) for m in lines if isinstance(m.get("train/ce_loss"), float)
    ]
    val = [
        (m["step"], m["val/nelbo"], float(m["val/nelbo_se"])) for m in lines if isinstance(m.get("val/nelbo"), float)
    ]
    if not train:
        raise InputError(
            f"plot: {folder / 'metrics.jsonl'} holds no training metrics; name a run folder that `train` made"
        )
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    steps, loss, ce = zip(*train)
    axes.plot(steps, loss, color="tab:blue", alpha=0.25, linewidth=0.8, label="training loss (weighted, one batch)")
    axes.plot(steps, _smooth(loss), color="tab:blue", label="training loss, smoothed")
    axes.plot(steps, _smooth(ce), color="tab:gray", label="cross-entropy of masked tokens, smoothed")
    if val:
        steps, nelbo, error = zip(*val)
        axes.errorbar(
            steps, nelbo, [2 * e for e in error], color="tab:red", marker="o", label="validation NELBO (+- 2 SE)"
        )
    entropy = next((m["val/unigram_entropy"] for m in lines if "val/unigram_entropy" in m), None)
    if entropy:
        axes.axhline(entropy, color="black", linestyle=":", label="unigram entropy of the validation tokens")
    axes.set(xlabel="optimizer step", ylabel="nats per token", title=folder.name)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path = Path(output) if output else folder / "loss.png"
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"plot: {path} cannot be written ({error}); give --output a .png, .pdf or .svg in a folder that exists"
        ) from None
    pyplot.close(figure)
    return path


def _smooth(values: tuple[float, ...], decay: float = 0.95) -> list[float]:
    """Exponential moving average without the bias of its start (as in Adam, arXiv 1412.6980, section 3)."""
    smoothed, average = [], 0.0
    for n, value in enumerate(values, 1):
        average = decay * average + (1 - decay) * value
        smoothed.append(average / (1 - decay**n))
    return smoothed
