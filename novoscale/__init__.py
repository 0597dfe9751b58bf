"""NovoGrad for models that do not fit: the same training, however the model is cut."""

from novoscale.groups import ParamGroups, param_groups
from novoscale.novograd import NovoGrad

__version__ = "0.1.0"
__all__ = ["NovoGrad", "ParamGroups", "__version__", "param_groups"]
