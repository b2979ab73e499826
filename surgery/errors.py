"""Typed errors of surgery and of exports; those that the graph passes raise are in :mod:`passes.errors`."""

from passes.errors import SurgeryError


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
