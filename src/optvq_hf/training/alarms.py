"""Named alarms: what is going wrong in a run, read from the last entries of its log, and what to do about it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Alarm:
    """Rings when `test` is true of `entries` log entries in a row."""

    name: str
    test: Callable[[dict], bool]
    remedy: str
    entries: int = 3


def _collapsed(entry: dict) -> bool:
    """Fewer than half the codes that as many tokens would use if they chose at random."""
    return entry["codebook_usage"] < 0.5 * entry["expected_usage"]


def _discriminator_wins(entry: dict) -> bool:
    """Hinge and cross-entropy alike are below a tenth of what they are for a discriminator that cannot tell."""
    return entry.get("discriminator", 1.0) < 0.1


ALARMS = (
    Alarm(
        "codebook_collapse",
        _collapsed,
        "most codes are not used: assign with the transport (--training-assignment sinkhorn), lower the learning rate, start "
        "the codebook on features (--codebook-start kmeans), or revive codes (--reseed-dead-codes-after)",
    ),
    Alarm(
        "codebook_off_features",
        lambda entry: entry["codebook_distance"] > 2.0,
        "features are far from all codes, compared with how they are spread: start the codebook on features (--codebook-start "
        "samples), or let the projection move it (--use-codebook-projection true)",
    ),
    Alarm(
        "discriminator_wins",
        _discriminator_wins,
        "the discriminator tells all reconstructions from images, so its gradient helps no more: lower "
        "--discriminator-learning-rate, start later (--discriminator-start), rise slowly (--discriminator-ramp), or regularise "
        "(--lecam-weight, --r1-weight)",
    ),
    Alarm(
        "nonfinite_loss",
        lambda entry: entry["nonfinite_steps"] > 0,
        "loss or gradient were NaN or infinite and the step was left out: look for broken images, lower the learning rate, or "
        "train without bf16",
        entries=1,
    ),
    Alarm(
        "data_starved",
        lambda entry: entry["data_wait"] > 50,
        "more than half the time goes by waiting for images: raise --num-workers, or make the images smaller beforehand",
    ),
    Alarm(
        "unreadable_images",
        lambda entry: entry.get("unreadable_images", 0) > 1,
        "more than 1 % of the images cannot be read and were replaced by others: check the dataset",
        entries=1,
    ),
)

LONGEST_PATIENCE = max(alarm.entries for alarm in ALARMS)


def ringing(entries: list[dict]) -> list[str]:
    """Names of the alarms that the last entries of a log call for."""
    return [
        alarm.name
        for alarm in ALARMS
        if len(entries) >= alarm.entries and all(alarm.test(entry) for entry in entries[-alarm.entries :])
    ]


def remedy(name: str) -> str:
    return next(alarm.remedy for alarm in ALARMS if alarm.name == name)
