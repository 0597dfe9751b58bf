"""NovoGrad for models that do not fit: the same training, however the model is cut."""

from novoscale.groups import ParamGroups, param_groups
from novoscale.novograd import NovoGrad
from novoscale.release import ReleasedGradients, release_gradients

__version__ = "0.1.0"
__all__ = [
    "NovoGrad",
    "ParamGroups",
    "ReleasedGradients",
    "__version__",
    "param_groups",
    "release_gradients",
]
