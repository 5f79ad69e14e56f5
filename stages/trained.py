"""What earlier stages have trained, for those that build on it."""

from __future__ import annotations

from models.autoencoder import Vaes, load_vae
from models.predictor import Predictor
from pipeline.stage import ARTIFACTS


def load_vaes(kind: type[Predictor]) -> Vaes:
    """The autoencoders that predictors of this class need, from their stages."""
    return {key: load_vae(ARTIFACTS / "vae" / key) for key in sorted(kind.needs_vaes)}
