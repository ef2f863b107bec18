"""The Frechet distance between the features of two sets of images (Heusel et al. 2017, equation 6), in float64."""

from dataclasses import dataclass

import torch


@dataclass
class FeatureSums:
    """Sums over features, from which their mean and covariance follow. Sums of parts add up, in any order.

    Attributes:
        count: Number of features.
        total: (D,) float64.
        products: (D, D) float64, the sum of the outer products.
    """

    count: int
    total: torch.Tensor
    products: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> "FeatureSums":
        """Those of features (N, D).

        Raises:
            ValueError: For features of another shape, or that are not finite.
        """
        if features.ndim != 2 or not features.isfinite().all():
            raise ValueError(f"features must be (N, D) and finite, got {tuple(features.shape)}")
        features = features.double()
        return cls(len(features), features.sum(dim=0), features.T @ features)

    def __add__(self, other: "FeatureSums") -> "FeatureSums":
        return FeatureSums(self.count + other.count, self.total + other.total, self.products + other.products)

    def to(self, device: torch.device | str) -> "FeatureSums":
        return FeatureSums(self.count, self.total.to(device), self.products.to(device))

    def mean_and_covariance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(D,), and (D, D) with the divisor N - 1.

        Raises:
            ValueError: For fewer than two features.
        """
        if self.count < 2:
            raise ValueError(f"a Frechet distance needs at least 2 images, got {self.count}")
        mean = self.total / self.count
        return mean, (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(a: FeatureSums, b: FeatureSums) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), at least 0, with the covariances A and B.

    The trace of the root is that of the symmetric (A^(1/2) B A^(1/2))^(1/2), whose eigenvalues are real, also with fewer images
    than features. Fewer images give a larger distance: compare values of equal numbers of images only.
    """
    (mean_a, covariance_a), (mean_b, covariance_b) = a.mean_and_covariance(), b.mean_and_covariance()
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    inner = root @ covariance_b @ root
    root_trace = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * root_trace
    return max(distance.item(), 0.0)
