"""NovoGrad for models that do not fit: the same training, however the model is sharded."""

from novoscale.optimizer import by_name
from novoscale.optimizer.novograd import NovoGrad
from novoscale.optimizer.param_groups import ParamGroups, param_groups
from novoscale.optimizer.release import ReleasedGradients, release_gradients

__version__ = "0.1.0"
__all__ = [
    "NovoGrad",
    "ParamGroups",
    "ReleasedGradients",
    "__version__",
    "param_groups",
    "release_gradients",
]

by_name.leave_hint()
