"""Make a model sparse in the patterns that sparse kernels are fast with, as methods of `torch.nn.utils.prune`.

Pruned layers look as torch leaves them: the parameter `weight_orig`, the buffer `weight_mask`, a forward pre-hook. So
`torch.nn.utils.prune.is_pruned` and `remove`, state_dicts, `pyops.optim` with `masks=model` and `pyops.swap_` take
them.

Sparsity is always the total afterwards, not a share of what is left, and what is pruned stays pruned. Pruning again
with the same method replaces it where torch would make a longer `PruningContainer` each time.
"""

from pyops.prune.dead_channels import Removed, remove_dead_channels_
from pyops.prune.functions import bake_, channels, ic_block, magnitude, n_m, oc_block
from pyops.prune.layers import Pruned
from pyops.prune.methods import NM, Channels, IcBlock, Magnitude, OcBlock
from pyops.prune.schedule import GradualSchedule

__all__ = [
    "NM",
    "Channels",
    "GradualSchedule",
    "IcBlock",
    "Magnitude",
    "OcBlock",
    "Pruned",
    "Removed",
    "bake_",
    "channels",
    "ic_block",
    "magnitude",
    "n_m",
    "oc_block",
    "remove_dead_channels_",
]
