from torchvision._absent import absent_names
from torchvision.transforms import InterpolationMode as InterpolationMode

__getattr__ = absent_names(__name__)
