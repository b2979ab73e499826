"""Typed errors. Each message names what was operated on, what was expected, what was found and what to do."""

LONGEST = 4000


class SurgeryError(Exception):
    """Base of every error that this library raises on purpose; the model and the disk are as they were."""

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """A text as a terminal may show it: names come from files, and may hold escape sequences or be very long."""
    text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in shortened(text))
    return shortened(text)


def shortened(text: str) -> str:
    """A text, or the beginning and the end of a very long one."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


class InputError(SurgeryError):
    """Example inputs, a coefficient or another argument does not fit the model."""


class CaptureError(SurgeryError):
    """Something needs the model's graph, and the model could not be captured."""


class PassError(SurgeryError):
    """A graph pass found its precondition or its result violated."""
