import enum

from torchvision._absent import absent_names


class InterpolationMode(enum.Enum):
    """A real one: transformers builds tables of its members when it is imported."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


from torchvision.transforms import functional as functional  # noqa: E402  # needs the enum

__getattr__ = absent_names(__name__)
