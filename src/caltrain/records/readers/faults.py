"""The errors that several readers raise, each code in one place."""

from __future__ import annotations

from caltrain.errors import DataError


def not_found(what: str, *, step: str, fix: str = "Check the path.") -> DataError:
    """A file or a folder that should be there is not."""
    return DataError("reader.not-found", what, step=step, fix=fix)


def malformed(what: str, *, step: str) -> DataError:
    """Bytes that do not have the form that their name or their first bytes announce."""
    fix = "Get the file again; if it was converted, write it again in the documented form."
    return DataError("reader.malformed", what, step=step, fix=fix)


def wrong_length(what: str, *, step: str) -> DataError:
    """A header announces more, or less, than the file holds."""
    fix = "The file was cut off or its header was changed: get it again."
    return DataError("reader.length", what, step=step, fix=fix)


def wrong_kind(what: str, *, step: str) -> DataError:
    """Elements of a type that is not read: objects, floating point, 16-bit pictures."""
    return DataError("reader.kind", what, step=step, fix="Store images as uint8 and labels as integers.")


def wrong_shape(what: str, *, step: str) -> DataError:
    """Arrays whose shapes are not those of labelled images."""
    fix = "Give (N, height, width[, channels]) images with 1, 3 or 4 channels, and one label to each."
    return DataError("reader.shape", what, step=step, fix=fix)


def empty(what: str, *, step: str) -> DataError:
    """A part of a set without a record."""
    return DataError("reader.empty", what, step=step, fix="Training and test part need an image at least.")


def too_large(what: str, *, step: str) -> DataError:
    """A size over the bounds of `caltrain.records.readers.bounds`, announced or real."""
    return DataError("reader.too-large", what, step=step, fix="Use fewer or smaller images.")


def missing_part(what: str, *, step: str, fix: str) -> DataError:
    """A container without the array, column or member that its format needs."""
    return DataError("reader.missing-part", what, step=step, fix=fix)


def class_names_differ(what: str, *, step: str) -> DataError:
    """Parts of one data set that do not agree on what its classes are."""
    fix = "Use parts of one data set, with the same classes in the same order."
    return DataError("reader.class-names-differ", what, step=step, fix=fix)
