"""Settings of a conversion, and of publishing."""

from dataclasses import dataclass, field

from ..data.arguments import argument


@dataclass
class ConversionArguments:
    """Configuration, assignment and checks of a conversion."""

    _argument_group_name = "conversion"

    reference_config: str | None = argument(
        None, "Configuration of the model (YAML or JSON); needed for training checkpoints, which lack it"
    )
    keep_batch_assignment: bool = argument(
        False,
        "At inference assign by transport over the batch, as the original does; the codes of an image then depend on the "
        "other images of its batch. By default every feature gets its nearest code",
    )
    with_discriminator: bool = argument(False, "Keep the discriminator too, in OUT/discriminator, for further training")
    check_images: list[str] | None = field(
        default=None,
        metadata={
            "help": "Image files or folders (write this flag after SOURCE and OUT): print how many of their codes differ "
            "between transport over all of them and nearest codes"
        },
    )
    license: str = argument("mit", "Licence of the weights, for the model card; MIT is that of the original")


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
        None, "Licence of the weights, for the model card: by default that of converted weights, otherwise apache-2.0"
    )
    message: str | None = argument(None, "Message of the commit")

    def __post_init__(self) -> None:
        if self.create_pr and self.revision != "main":
            raise ValueError("--create-pr opens a pull request for main: drop --revision")
