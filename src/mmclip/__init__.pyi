from mmclip.api import Model as Model
from mmclip.api import load as load

__version__: str
