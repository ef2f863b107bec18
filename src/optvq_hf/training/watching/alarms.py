"""Named alarms: what is going wrong in a run, read from the last entries of its log, and what to do about it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


Entries = Sequence[dict]

# Encoder and codebook, both random at first, need some steps to find each other.
FIRST_STEPS = 30
# Entries of the log that are looked at.
LONGEST_LOOK = 200


@dataclass(frozen=True)
class Alarm:
    """Rings when `test` is true of the last entries of a log, the newest last."""

    name: str
    test: Callable[[Entries], bool]
    remedy: str


def _lasting(test: Callable[[dict], bool], entries: int = 3) -> Callable[[Entries], bool]:
    """Makes a test of one entry a test that this many entries in a row pass, after the first steps."""

    def of_all(log: Entries) -> bool:
        last = [entry for entry in log[-entries:] if entry["step"] >= FIRST_STEPS]
        return len(last) == entries and all(map(test, last))

    return of_all


def _collapsed(entry: dict) -> bool:
    """Fewer than half the codes that as many tokens would use if they chose at random."""
    return entry["codebook_usage"] < 0.5 * entry["expected_usage"]


def _far(log: Entries) -> bool:
    """Features are far from their codes for three entries, and do not come nearer."""
    return _lasting(lambda entry: entry["codebook_distance"] > 2)(log) and (
        log[-1]["codebook_distance"] > 0.95 * log[-3]["codebook_distance"]
    )


def _off_features(log: Entries) -> bool:
    """All codes lie on one side, where neither features nor the origin are, and the quantizer's loss drags features there; or
    features are far from all codes; or nearly all of the loss is the quantizer's."""
    one_sided = log[-1]["codebook_offset"] > 2 and log[-1]["quantizer_share"] > 75
    return one_sided or _far(log) or _lasting(lambda entry: entry["quantizer_share"] > 90)(log)


def _discriminator_wins(log: Entries) -> bool:
    """The mean gap between real and fake logits is twice the two margins of the hinge loss."""
    gaps = [entry["logits_real"] - entry["logits_fake"] for entry in log[-3:] if "logits_real" in entry]
    return len(gaps) == 3 and sum(gaps) / 3 > 4


def _diverges(log: Entries) -> bool:
    """The mean squared error of ten entries is twice the lowest that any ten before them had."""
    errors = [entry["l2"] for entry in log]
    means = [sum(errors[end - 10 : end]) / 10 for end in range(10, len(errors) + 1)]
    return len(means) > 10 and means[-1] > 2 * min(means[:-10])


ALARMS = (
    Alarm(
        "codebook_collapse",
        _lasting(_collapsed),
        "most codes are not used: assign with the transport (--training-assignment sinkhorn), lower the learning rate, start "
        "the codebook on features (--codebook-start kmeans), or revive codes (--reseed-dead-codes-after)",
    ),
    Alarm(
        "codebook_off_features",
        _off_features,
        "codes and features lie apart, or their scale makes the quantizer's loss nearly all of the loss: start the codebook on "
        "features (--codebook-start samples), let the projection move it (--use-codebook-projection true), or lower "
        "--quantizer-weight",
    ),
    Alarm(
        "discriminator_wins",
        _discriminator_wins,
        "the discriminator tells all reconstructions from images, so its gradient helps no more: lower "
        "--discriminator-learning-rate, start later (--discriminator-start), rise slowly (--discriminator-ramp), or regularise "
        "(--lecam-weight, --r1-weight)",
    ),
    Alarm(
        "reconstruction_diverges",
        _diverges,
        "the reconstruction error is twice what it was: lower the learning rate; if it began with the discriminator, lower "
        "--adversarial-weight or --discriminator-learning-rate, or let it rise slowly (--discriminator-ramp)",
    ),
    Alarm(
        "nonfinite_loss",
        lambda log: log[-1]["nonfinite_steps"] > 0,
        "loss or gradient were NaN or infinite and the step was skipped: look for broken images, lower the learning rate, or "
        "train without bf16",
    ),
    Alarm(
        "data_starved",
        _lasting(lambda entry: entry["data_wait"] > 50),
        "more than half the time is spent waiting for images: raise --num-workers, or make the images smaller beforehand",
    ),
    Alarm(
        "unreadable_images",
        lambda log: log[-1]["unreadable_images"] > 1,
        "more than 1 % of the images cannot be read and were replaced by others: check the dataset",
    ),
)


def ringing(log: Entries) -> list[str]:
    """Names the alarms that ring after the last entries of a log."""
    return [alarm.name for alarm in ALARMS if alarm.test(log)]


def remedy(name: str) -> str:
    """Says what to do about an alarm."""
    return next(alarm.remedy for alarm in ALARMS if alarm.name == name)
