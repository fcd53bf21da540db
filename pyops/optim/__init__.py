"""Drop-ins for `torch.optim`: a step is one pass over memory, with clipping, averaging, masking and more folded in."""

from pyops.optim.adadelta import Adadelta
from pyops.optim.adafactor import Adafactor
from pyops.optim.adagrad import Adagrad
from pyops.optim.adam import Adam, AdamW
from pyops.optim.adamax import Adamax
from pyops.optim.base import FusedOptimizer
from pyops.optim.lamb import LAMB
from pyops.optim.lion import Lion
from pyops.optim.masks import masks_of
from pyops.optim.nadam import NAdam
from pyops.optim.options import StepOptions
from pyops.optim.radam import RAdam
from pyops.optim.rmsprop import RMSprop
from pyops.optim.sgd import SGD

__all__ = [
    "LAMB",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "FusedOptimizer",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "StepOptions",
    "masks_of",
]
