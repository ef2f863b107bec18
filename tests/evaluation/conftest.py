import pytest
import torch

from optvq_hf.evaluation.feature_networks import FeatureNetwork


@pytest.fixture(autouse=True)
def runs(fresh_run):
    """Tests here run commands."""


@pytest.fixture(scope="session")
def small_network() -> FeatureNetwork:
    """A network of twelve features, for Frechet distances that take no time."""
    pool = torch.nn.AdaptiveAvgPool2d(2)
    return FeatureNetwork(lambda images: pool(images.float()).flatten(1), side=None)
