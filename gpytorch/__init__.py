"""GPyTorch, with exact GPs on plain tensors behind ``gpytorch.settings.use_torch_tensors``."""

from . import _upstream

_upstream.lay_over(__name__, "operators.cholesky", "models.dense_prediction_strategy")
