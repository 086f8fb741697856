"""Generative Modeling via Drifting: the field, its loss, the models, one-step sampling."""

from drift.errors import InputError
from drift.field import drifting_field
from drift.generator import GENERATORS, Generator
from drift.loss import DriftLoss, drift_loss
from drift.sampling import DriftPipeline

__version__ = "0.1.0"
__all__ = ["GENERATORS", "DriftLoss", "DriftPipeline", "Generator", "InputError", "drift_loss", "drifting_field"]
