"""Typed errors. Each message names what was operated on, what was expected, what was found and what to do."""


class SurgeryError(Exception):
    """Base of every error that this library raises on purpose; the model and the disk are as they were."""


class InputError(SurgeryError):
    """Example inputs, a coefficient or another argument does not fit the model."""


class CaptureError(SurgeryError):
    """Something needs the model's graph, and the model could not be captured."""


class PassError(SurgeryError):
    """A graph pass found its precondition or its result violated."""


class TargetError(SurgeryError):
    """A pattern selects nothing, or a site that cannot be operated on."""


class RankError(SurgeryError):
    """A rank is below 1 or above what its site allows."""


class VariantError(SurgeryError):
    """A variant is unknown, misconfigured, or does not support what was asked of it."""


class WeightError(SurgeryError):
    """A weight is on the meta device, quantised, not finite, or tied where that is not allowed."""


class AdapterError(SurgeryError):
    """An adapter directory is missing, damaged, or belongs to another model."""


class ExportError(SurgeryError):
    """An export is not possible, or its result does not agree with the model."""
