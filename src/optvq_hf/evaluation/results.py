"""Names, columns and table of evaluation results, and the hash of the weights they belong to."""

import hashlib

import torch

from ..modeling_optvq import OptVQModel


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


def weights_digest(model: OptVQModel) -> str:
    """SHA-256 of the names and values of a model's tensors, which ties results to weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.view(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b"")
    return digest.hexdigest()
