"""Frechet distance: how far apart two sets of videos or images are, given features of each."""

import torch
from torch import Tensor


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to features [n, D] and [m, D]; small sets bias it upwards."""
    # |mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) with covariances A and B
    a, b = features_a.double(), features_b.double()
    between = (a.mean(0) - b.mean(0)).square().sum()
    a, b = (x.T.cov(correction=0).reshape(x.shape[1], -1) for x in (a, b))  # with D = 1, cov gives a scalar
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # A^1/2; rounding can leave eigenvalues just below 0
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float(between + a.trace() + b.trace() - 2 * cross))
