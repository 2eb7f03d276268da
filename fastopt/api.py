"""Every name of `fastopt` itself. The package imports this module, and torch with it, when one is used first."""

from .base import _BaseOptimizer
from .cbs import (
    adam_step,
    average_grad,
    average_sqr_grad,
    debias,
    l2_reg,
    lamb_step,
    larc_layer_lr,
    larc_step,
    lookahead_start,
    lookahead_step,
    momentum_step,
    qhadam_step,
    radam_step,
    rms_prop_step,
    sgd_step,
    step_stat,
    weight_decay,
)
from .engine.reductions import whole_norm, whole_rms
from .hypers import detuplify_pg, pytorch_hp_map, set_item_pg
from .lookahead import Lookahead, Ranger, ranger
from .optimizer import Optimizer
from .optimizers import SGD, Adam, Lamb, Larc, QHAdam, RAdam, RMSProp
from .pieces import Box, Piece
from .wrapper import OptimWrapper

__all__ = [
    "SGD",
    "Adam",
    "Box",
    "Lamb",
    "Larc",
    "Lookahead",
    "OptimWrapper",
    "Optimizer",
    "Piece",
    "QHAdam",
    "RAdam",
    "RMSProp",
    "Ranger",
    "_BaseOptimizer",
    "adam_step",
    "average_grad",
    "average_sqr_grad",
    "debias",
    "detuplify_pg",
    "l2_reg",
    "lamb_step",
    "larc_layer_lr",
    "larc_step",
    "lookahead_start",
    "lookahead_step",
    "momentum_step",
    "pytorch_hp_map",
    "qhadam_step",
    "radam_step",
    "ranger",
    "rms_prop_step",
    "set_item_pg",
    "sgd_step",
    "step_stat",
    "weight_decay",
    "whole_norm",
    "whole_rms",
]
