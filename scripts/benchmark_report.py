"""Tables and plot of scripts/benchmark_sinkhorn.py, from its results."""

import math
from pathlib import Path


METHOD_NAMES = {
    "cdist_argmin": "`cdist` + `argmin`",
    "nearest_assign": "`nearest_assign`",
    "cached": "ours, cached",
    "streamed": "ours, streamed",
    "partly_kept": "ours, 512 MiB",
    "exponential": "exponential",
    "pot": "POT",
}
# Those that an earlier version of this library is compared in.
COMPARED = ("nearest_assign", "cached", "streamed")


def earlier(method: str) -> str:
    """The name in the results of the same method of an earlier version."""
    return f"{method} before"


def markdown(results: dict) -> str:
    """The tables of docs/solver.md."""

    def table(header, rows):
        return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, ["-"] * len(header), *rows))

    def size(row):
        return [f"{row['N']:,}", f"{row['K']:,}", row["d"]]

    def milliseconds(seconds):
        return f"{1e3 * seconds:,.3g} ms" if seconds < 1 else f"{seconds:.2f} s"

    def time_cells(seconds):
        yardstick = seconds.get("cdist_argmin", math.nan)
        return [
            f"{milliseconds(seconds[m])} ({seconds[m] / yardstick:.2f})".replace(" (nan)", "") if m in seconds else ""
            for m in METHOD_NAMES
        ]

    def cells(values, methods, text):
        return ["" if m not in values else "-" if values[m] is None else text.format(values[m]) for m in methods]

    def ratios(values):
        return [f"{values[m] / values[earlier(m)]:.2f}" if earlier(m) in values else "" for m in compared]

    solvers = ("cached", "exponential", "pot")
    compared = [m for m in COMPARED if any(earlier(m) in r["seconds"] for r in results["times"])]
    times = [[*size(r), *time_cells(r["seconds"]), *ratios(r["seconds"])] for r in results["times"]]
    memory = [
        [
            *size(r),
            *cells({m: b / 1e9 for m, b in r["bytes"].items()}, list(METHOD_NAMES)[:-1], "{:.2f}"),
            *ratios(r["bytes"]),
        ]
        for r in results["memory"]
    ]
    accuracy = [
        [
            *size(r),
            f"{r['epsilon']:g}",
            *cells(r["agreement"], solvers, "{:.2f} %"),
            *cells(r["marginal_error"], ("exact", *solvers), "{:.3f}"),
        ]
        for r in results["accuracy"]
    ]
    busy = [[name, *map(milliseconds, seconds.values())] for name, seconds in results["busy"].items()]
    step, errors = results["training_step"]["seconds"], results["training_step"]["error"]
    yardsticks = ("nearest", "nearest, `cdist` + `argmin`", "exponential", "exponential, guarded, not in place")
    steps = [
        [name, milliseconds(s), *(f"{s / step[y]:.2f}" for y in yardsticks), f"{errors[name]:.3f}"]
        for name, s in step.items()
    ]
    growth = " and as ".join(f"{axis}^{value:.2f}" for axis, value in results["exponents"].items())
    names, to_before = list(METHOD_NAMES.values()), [f"{METHOD_NAMES[m]}, to before" for m in compared]
    compiled = results["compiled"] or {}
    parts = [
        f"{results['machine']}. Time, and in brackets its ratio to `torch.cdist` + `argmin` in the same run:",
        *[
            'The columns "to before" are ratios to an earlier version of this library in the same run.'
            for _ in compared[:1]
        ],
        table(["N", "K", "d", *names, *to_before], times),
        f"The time of the streamed solver grows as {growth}.",
        "Peak memory above the inputs, GB:",
        table(["N", "K", "d", *names[:-1], *to_before], memory),
        "Codes equal to those of the float64 iteration (rows whose margin is above 1e-3), and marginal error of the plan:",
        table(
            ["N", "K", "d", "epsilon", "ours", "exponential", "POT", "error: exact", "ours", "exponential", "POT"],
            accuracy,
        ),
        "N 16,384, K 1,024, d 2, alone and with another process at work on one of the cores:",
        table(["", *(METHOD_NAMES[m] for m in results["busy"]["quiet"])], busy),
        *[
            f"Under torch.compile: {milliseconds(s['compiled'])}, without {milliseconds(s['eager'])}."
            for s in [compiled]
            if s
        ],
        "A training step of the MNIST recipe with 4 heads (N 16,384, K 1,024, d 2): forward, backward and update. Its time, "
        "and the ratio of that to others:",
        table(["assignment", "step", *(f"to {y}" for y in yardsticks), "L1 + L2 at the end"], steps),
    ]
    return "\n\n".join(parts) + "\n"


def draw(times: list[dict], path: Path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for ax, axis, fixed in ((axes[0], "K", {"N": 2048, "d": 64}), (axes[1], "N", {"K": 4096, "d": 64})):
        rows = sorted((r for r in times if all(r[k] == v for k, v in fixed.items())), key=lambda r: r[axis])
        for method in METHOD_NAMES:
            line = [(r[axis], r["seconds"][method]) for r in rows if method in r["seconds"]]
            if line:
                ax.loglog(*zip(*line), marker="o", label=method)
        ax.set_xlabel({"K": "codes K", "N": "features N"}[axis])
        ax.set_title(", ".join(f"{k} {v:,}" for k, v in fixed.items()))
        ax.grid(True, which="both", alpha=0.3)
    axes[0].set_ylabel("seconds")
    if axes[0].lines:
        axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
