"""What is asked of a conversion, and of a publication."""

from dataclasses import dataclass, field

from ..data.arguments import argument


@dataclass
class ConversionArguments:
    """One conversion."""

    _argument_group_name = "conversion"

    reference_config: str | None = argument(
        None, "Configuration of the model, YAML or JSON; needed for a training checkpoint, which has none in it"
    )
    keep_batch_assignment: bool = argument(
        False,
        "At inference assign by transport over the batch, as the original does; the codes of an image then depend on the "
        "images beside it. By default every feature gets its nearest code",
    )
    with_discriminator: bool = argument(False, "Keep the discriminator too, in OUT/discriminator, to train on with")
    check_images: list[str] | None = field(
        default=None,
        metadata={
            "help": "Image files, or folders of them (write these after SOURCE and OUT): print how many of their codes differ "
            "between transport over all of them and nearest codes"
        },
    )
    license: str = argument("mit", "Licence of the weights, for the model card; the original's are under MIT")


@dataclass
class PublishingArguments:
    """One publication."""

    _argument_group_name = "publishing"

    private: bool = argument(False, "Make a new repository private")
    revision: str = argument("main", "Branch to commit to; made if missing")
    create_pr: bool = argument(False, "Open a pull request instead of committing")
    dry_run: bool = argument(False, "List what would be committed, check it, and send nothing")
    card_only: bool = argument(False, "Write the model card to FOLDER/README.md, to be edited, and send nothing")
    license: str | None = argument(
        None, "Licence of the weights, for the model card: by default that of converted weights, otherwise apache-2.0"
    )
    message: str | None = argument(None, "Message of the commit")

    def __post_init__(self) -> None:
        if self.create_pr and self.revision != "main":
            raise ValueError("--create-pr proposes a change of main: drop --revision")
