"""Settings of a transplant; those of its stages are in recipes."""

from dataclasses import dataclass

from ..data.arguments import argument


@dataclass
class TransplantArguments:
    """Model, stages and output of a transplant."""

    _argument_group_name = "transplant"

    model: str | None = argument(None, "Hub id or folder of the model, as `optvq convert` writes it")
    model_revision: str | None = argument(None, "Branch, tag or commit of a model on the Hub")
    output_dir: str = argument(
        "runs/transplant", "Folder for the latents and both stages; started again, only what is missing is done"
    )
    quantizer_config: str = argument(
        "transplant_quantizer",
        "Recipe of the first stage, which trains the quantizer: a file, or a name as of `optvq train`",
    )
    decoder_config: str = argument(
        "transplant_decoder",
        "Recipe of the second stage, which trains the decoder: a file, or a name as of `optvq train`",
    )
    flips: bool = argument(False, "Add the latents of every image mirrored")
    crops: int = argument(0, "Add the latents of so many random crops of every image")
    overwrite: bool = argument(False, "Remove what earlier commands left in the folders of the stages, and start anew")
