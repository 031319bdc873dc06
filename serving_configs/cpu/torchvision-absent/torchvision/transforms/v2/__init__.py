from torchvision._absent import absent_names
from torchvision.transforms import InterpolationMode as InterpolationMode
from torchvision.transforms.v2 import functional as functional

__getattr__ = absent_names(__name__)
