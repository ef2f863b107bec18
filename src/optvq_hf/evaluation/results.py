"""Names, columns and table of evaluation results."""

METRICS_FILE, RECONSTRUCTIONS_FILE, USAGE_FILE = "metrics.json", "reconstructions.png", "codebook_usage.png"

# Key in metrics.json, column title, format.
COLUMNS = {
    "mse": ("MSE [-1, 1]", "{:.4f}"),
    "psnr": ("PSNR dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "codebook_usage": ("usage %", "{:.1f}"),
    "perplexity": ("perplexity", "{:.0f}"),
}


def format_table(by_assignment: dict[str, dict]) -> str:
    """The results as a table of text, one line per assignment."""
    lines = [" | ".join(["assignment".ljust(10)] + [title.rjust(11) for title, _ in COLUMNS.values()])]
    for assignment, metrics in by_assignment.items():
        cells = ["-" if metrics[key] is None else form.format(metrics[key]) for key, (_, form) in COLUMNS.items()]
        cells = [cell.rjust(11) for cell in cells]
        lines.append(" | ".join([assignment.ljust(10), *cells]))
    return "\n".join(lines)
