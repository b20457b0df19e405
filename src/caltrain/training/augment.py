"""What may be asked of augmentation, checked before any record is read. Needs no torch."""

from __future__ import annotations

from caltrain.errors import ConfigError
from caltrain.models.layers import Shape
from caltrain.training.spec import Augment


def check_augment(augment: Augment, shape: Shape, size: tuple[int, int] | None) -> None:
    """Raise ConfigError unless records of `shape` (channels, height, width) can be changed so, and cropped to `size`.

    `augment.colour`: hue, saturation or exposure of what is not red, green and blue; `augment.crop`: sizes to scale to
    that are not a range, or smaller than the crop, which would then show borders that are in no record.
    """
    if (augment.hue or augment.saturation or augment.exposure) and shape[0] != 3:
        raise _refused(
            "augment.colour",
            f"hue, saturation and exposure need 3 channels, the records have {shape[0]}",
            "Set them to 0 in [training.augment].",
        )
    if not (augment.min_crop or augment.max_crop):
        return
    least = min(size or shape[1:])
    if not least <= augment.min_crop <= augment.max_crop:
        raise _refused(
            "augment.crop",
            f"min_crop {augment.min_crop} and max_crop {augment.max_crop} are no range from {least} pixels up",
            "Set both so that the scaled record fills the crop, or neither.",
        )


def _refused(code: str, what: str, fix: str) -> ConfigError:
    return ConfigError(code, what, step="check augmentation", fix=fix)
