"""Alarms: known problems of a run, detected in the last entries of its log, each with a remedy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


Entries = Sequence[dict]

# Steps before alarms: encoder and codebook are random at first.
FIRST_STEPS = 30
# Number of log entries that alarms look at.
LONGEST_LOOK = 200


@dataclass(frozen=True)
class Alarm:
    """A problem, present when `test` is true of the last entries of a log, the newest last."""

    name: str
    test: Callable[[Entries], bool]
    remedy: str


def _lasting(test: Callable[[dict], bool], entries: int = 3) -> Callable[[Entries], bool]:
    """Makes a test of one entry into a test of this many entries in a row, after the first steps."""

    def of_all(log: Entries) -> bool:
        last = [entry for entry in log[-entries:] if entry["step"] >= FIRST_STEPS]
        return len(last) == entries and all(map(test, last))

    return of_all


def _collapsed(entry: dict) -> bool:
    """Usage below half of that of the same number of tokens drawn uniformly at random."""
    return entry["codebook_usage"] < 0.5 * entry["expected_usage"]


def _far(log: Entries) -> bool:
    """Features are far from their codes for three entries, and do not get closer."""
    return _lasting(lambda entry: entry["codebook_distance"] > 2)(log) and (
        log[-1]["codebook_distance"] > 0.95 * log[-3]["codebook_distance"]
    )


def _off_features(log: Entries) -> bool:
    """The codes lie together, far from features and origin, and the quantizer's loss pulls the features there; or features are
    far from all codes; or nearly all of the loss is the quantizer's."""
    one_sided = log[-1]["codebook_offset"] > 2 and log[-1]["quantizer_share"] > 75
    return one_sided or _far(log) or _lasting(lambda entry: entry["quantizer_share"] > 90)(log)


def _discriminator_wins(log: Entries) -> bool:
    """The mean gap between real and fake logits is above 4, twice the two margins of the hinge loss."""
    gaps = [entry["logits_real"] - entry["logits_fake"] for entry in log[-3:] if "logits_real" in entry]
    return len(gaps) == 3 and sum(gaps) / 3 > 4


def _diverges(log: Entries) -> bool:
    """The mean squared error of ten entries is twice the lowest of any earlier ten."""
    errors = [entry["l2"] for entry in log]
    means = [sum(errors[end - 10 : end]) / 10 for end in range(10, len(errors) + 1)]
    return len(means) > 10 and means[-1] > 2 * min(means[:-10])


ALARMS = (
    Alarm(
        "codebook_collapse",
        _lasting(_collapsed),
        "most codes are dead: assign by transport (--training-assignment sinkhorn), lower --learning-rate, start the codebook "
        "on features (--codebook-start kmeans), or move dead codes (--reseed-dead-codes-after)",
    ),
    Alarm(
        "codebook_off_features",
        _off_features,
        "codes lie far from the features, or the quantizer's loss is nearly all of the loss: start the codebook on "
        "features (--codebook-start samples), let the projection move it (--use-codebook-projection true), or lower "
        "--quantizer-weight",
    ),
    Alarm(
        "discriminator_wins",
        _discriminator_wins,
        "the discriminator separates all reconstructions from images, so its gradient no longer helps: lower "
        "--discriminator-learning-rate, raise --discriminator-start or --discriminator-ramp, or regularise it (--lecam-weight, "
        "--r1-weight)",
    ),
    Alarm(
        "reconstruction_diverges",
        _diverges,
        "the reconstruction error has doubled: lower --learning-rate; if that began with the discriminator, lower "
        "--adversarial-weight or --discriminator-learning-rate, or raise --discriminator-ramp",
    ),
    Alarm(
        "nonfinite_loss",
        lambda log: log[-1]["nonfinite_steps"] > 0,
        "a loss or gradient was NaN or infinite, and the step was skipped: look for broken images, lower --learning-rate, or "
        "train without bf16",
    ),
    Alarm(
        "data_starved",
        _lasting(lambda entry: entry["data_wait"] > 50),
        "more than half the time is spent waiting for images: raise --num-workers, or resize the images beforehand",
    ),
    Alarm(
        "unreadable_images",
        lambda log: log[-1]["unreadable_images"] > 1,
        "more than 1 % of the images could not be read and were replaced: check the dataset",
    ),
)


def ringing(log: Entries) -> list[str]:
    """Names of the alarms that the last entries of a log raise."""
    return [alarm.name for alarm in ALARMS if alarm.test(log)]


def remedy(name: str) -> str:
    """The remedy of an alarm."""
    return next(alarm.remedy for alarm in ALARMS if alarm.name == name)
