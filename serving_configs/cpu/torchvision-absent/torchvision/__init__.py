"""torchvision's names without torchvision; see the pyproject.toml beside this package."""

from torchvision import transforms as transforms
from torchvision._absent import absent_names

__version__ = "0.0.0"
__getattr__ = absent_names(__name__)
