"""Settings of a conversion, and of publishing."""

import re
from dataclasses import dataclass, field
from typing import Literal

from ..data.arguments import argument


# Of a licence, as cards of the Hub have them.
IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


def check_license(license: str | None) -> None:
    """Raises ValueError for what is no identifier of a licence. None is fine."""
    if license is not None and not IDENTIFIER.fullmatch(license):
        raise ValueError(f"--license must be an identifier as mit, apache-2.0 or other, got {license!r}")


@dataclass
class ConversionArguments:
    """Library, configuration, codebook, assignment and checks of a conversion."""

    _argument_group_name = "conversion"

    from_: Literal["optvq", "diffusers", "taming", "llamagen"] = argument(
        "optvq",
        "Where SOURCE is from: the original of OptVQ; diffusers (AutoencoderKL, VQModel); taming-transformers (VQGAN, also of "
        "latent diffusion); LlamaGen (VQ-8, VQ-16)",
    )
    reference_config: str | None = argument(
        None, "Configuration of the model (YAML or JSON); needed for training checkpoints, which lack it"
    )
    image_size: int | None = argument(
        None, "Height and width in pixels to which images are resized; by default those of the source (not for optvq)"
    )
    codebook_size: int | None = argument(
        None,
        "Make a new codebook of so many codes (not for optvq). By default the codes of the source are kept; if it has none, "
        "there are 16384 new ones",
    )
    num_codebook_heads: int | None = argument(
        None, "Make a new codebook for so many heads (not for optvq); 1 by default"
    )
    keep_batch_assignment: bool = argument(
        False,
        "Only for optvq: at inference assign by transport over the batch, as the original does; the codes of an image then "
        "depend on the other images of its batch. By default every feature gets its nearest code",
    )
    with_discriminator: bool = argument(
        False, "Only for optvq: keep the discriminator too, in OUT/discriminator, for further training"
    )
    check_images: list[str] | None = field(
        default=None,
        metadata={
            "help": "Image files or folders (write this flag after SOURCE and OUT): print how many of their codes differ "
            "between transport over all of them and nearest codes"
        },
    )
    license: str | None = argument(
        None,
        "Licence of the weights, for the model card: by default that in the card of the source, and MIT for optvq; needed "
        "otherwise",
    )

    def __post_init__(self) -> None:
        check_license(self.license)
        is_original = self.from_ == "optvq"
        for name in ("image_size", "codebook_size", "num_codebook_heads"):
            if getattr(self, name) is not None and is_original:
                raise ValueError(f"--{name.replace('_', '-')} is for sources of other libraries: name one with --from")
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {number}")
        for name in ("keep_batch_assignment", "with_discriminator"):
            if getattr(self, name) and not is_original:
                raise ValueError(
                    f"--{name.replace('_', '-')} is for models of the original, not for --from {self.from_}"
                )


@dataclass
class PublishingArguments:
    """Repository, branch and card of a published model."""

    _argument_group_name = "publishing"

    private: bool = argument(False, "Make a new repository private")
    revision: str = argument("main", "Branch to commit to; created if it is missing")
    create_pr: bool = argument(False, "Open a pull request instead of committing to the branch")
    dry_run: bool = argument(False, "Check and list what would be committed, and send nothing")
    card_only: bool = argument(False, "Only write the model card to FOLDER/README.md, for editing, and send nothing")
    license: str | None = argument(
        None,
        "Licence of the weights, for the model card: by default that of converted weights, also if training began with them; "
        "not stated if it began with another model; otherwise apache-2.0",
    )
    message: str | None = argument(None, "Message of the commit")

    def __post_init__(self) -> None:
        check_license(self.license)
        if self.create_pr and self.revision != "main":
            raise ValueError("--create-pr opens a pull request for main: drop --revision")
