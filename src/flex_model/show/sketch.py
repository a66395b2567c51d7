"""``sketch``: the outline of a model that is nowhere: from its configuration alone, for ranks that need not exist.

Parameters are on the meta device, and this process is rank 0 of a world in which torch's ``fake`` process group answers
for the others. What FSDP would make of the values is what any data axis makes of them, so that it only shards the
parameters here; and what stages of a pipeline pass on is what the layers of the plain model do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from flex_model.core.flex_model import FlexModel
from flex_model.layout.meta_mode import IntegersAreReal
from flex_model.show.observe import observe
from flex_model.show.outline import AxisRow, Outline, outline

__all__ = ["sketch"]
