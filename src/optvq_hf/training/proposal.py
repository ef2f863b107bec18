"""The recipe that a run without one gets: what fits the images and the memory."""

from dataclasses import dataclass

from ..data.probe import ImageFacts


@dataclass
class Proposal:
    """A recipe by name, and the settings in which it is changed.

    Attributes:
        recipe: Name of a recipe that ships with the package.
        settings: Flags by name, over those of the recipe.
    """

    recipe: str
    settings: dict[str, float]

    def as_flags(self) -> list[str]:
        """As words of a command line."""
        flags = [[f"--{name.replace('_', '-')}", str(value)] for name, value in self.settings.items()]
        return ["--config", self.recipe, *(word for flag in flags for word in flag)]


def propose(facts: ImageFacts) -> Proposal:
    """A recipe for images like these.

    Images below 96 pixels get the paper's plain CNN (4 pixels per token along each axis), larger ones a VQGAN (16).
    """
    colour = {} if facts.num_channels == 3 else {"num_channels": 1}
    if facts.size < 48:
        return Proposal("cifar10" if facts.num_channels == 3 else "mnist", {})
    if facts.size < 96:
        return Proposal("cifar10", {"image_size": 64, **colour})
    return Proposal("photos", {"image_size": 128 if facts.size < 192 else 256, **colour})
