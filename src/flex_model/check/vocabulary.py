"""What functions and methods do that matters on many ranks: by what they are, and by name where that is not known."""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import MutableMapping, MutableSequence, MutableSet
from typing import Any

import torch
from torch import Tensor, nn

from flex_model.check.source import NOTHING

__all__ = [
    "ABOUT",
    "ADDING",
    "CHANGING",
    "COLLECTIVE_METHODS",
    "RANK_METHODS",
    "RANK_NAMES",
    "RANK_VARIABLES",
    "SIZE_VARIABLES",
    "VIEWS",
    "WHOLE_METHODS",
    "draws_in_dropout",
    "is_container",
    "is_pure_module",
    "meaning",
    "prints_by_name",
    "words",
]


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


RANK_VARIABLES = words(
    "RANK LOCAL_RANK GROUP_RANK ROLE_RANK SLURM_PROCID SLURM_LOCALID SLURM_NODEID OMPI_COMM_WORLD_RANK "
    "OMPI_COMM_WORLD_LOCAL_RANK PMI_RANK CUDA_VISIBLE_DEVICES HOSTNAME"
)
SIZE_VARIABLES = words("WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE SLURM_NTASKS SLURM_NPROCS")
RANK_NAMES = words("rank local_rank global_rank my_rank world_rank node_rank is_main is_rank_zero")
RANK_METHODS = words("get_rank get_local_rank get_node_local_rank get_coordinate get_group_rank")
COLLECTIVE_METHODS = frozenset({"full_tensor", "redistribute"})
WHOLE_METHODS = COLLECTIVE_METHODS | {"to_local"}  # what a tensor that is whole already does not have

_RANKS = RANK_METHODS | {"current_device"}
_SIZES = frozenset({"get_world_size", "get_group_size", "device_count"})
_COLLECTIVES = words(
    "all_reduce reduce broadcast all_gather all_gather_into_tensor all_gather_object gather gather_object scatter "
    "scatter_object_list reduce_scatter reduce_scatter_tensor all_to_all all_to_all_single barrier monitored_barrier "
    "send recv isend irecv batch_isend_irecv broadcast_object_list send_object_list recv_object_list new_group "
    "all_gather_tensor all_gather_tensor_autograd reduce_scatter_tensor_autograd all_to_all_single_autograd "
    "all_reduce_coalesced all_gather_coalesced permute_tensor distribute_tensor"
)
_DRAWS = words(
    "rand randn randint randperm rand_like randn_like randint_like bernoulli multinomial normal poisson dropout "
    "alpha_dropout feature_dropout feature_alpha_dropout rrelu native_dropout binomial"
)
_DRAWS_F = words("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout gumbel_softmax rrelu")
DRAWING_METHODS = words(
    "uniform_ normal_ bernoulli bernoulli_ multinomial exponential_ geometric_ cauchy_ log_normal_ random_"
)
_CLOCK = words("time time_ns perf_counter perf_counter_ns monotonic monotonic_ns process_time")
_HOST = words("getpid getppid gethostname getfqdn node uname urandom uuid1 uuid4 getnode")
_LOG = words("debug info warning warn error exception critical log")
_WRITES = words(
    "save dump savez savez_compressed savetxt save_file to_csv to_parquet write_text write_bytes writerow writerows "
    "imsave savefig tofile save_pretrained save_to_disk"
)
_TRACKERS = words("wandb mlflow tensorboard tensorboardX comet_ml neptune aim clearml swanlab")
_TRACKED = words(
    "add_scalar add_scalars add_histogram add_image add_text add_figure add_embedding log_metric log_metrics "
    "log_artifact"
)

VIEWS = words(
    "view view_as reshape reshape_as transpose permute movedim moveaxis swapaxes swapdims t unsqueeze squeeze flatten "
    "unflatten narrow select chunk split tensor_split unbind diagonal unfold as_strided contiguous detach real imag "
    "to float half double bfloat16 type type_as cpu cuda to_local requires_grad_ T mT H mH data swapaxes hsplit vsplit "
    "expand expand_as broadcast_to alias refine_names rename values"
)
ABOUT = words(
    "shape dtype device ndim layout requires_grad is_cuda is_leaf is_meta names grad_fn itemsize nbytes size dim numel "
    "stride is_floating_point is_complex nelement element_size ndimension is_contiguous storage_offset placements "
    "device_mesh _version is_inference is_sparse is_quantized"
)
ADDING = words("append extend appendleft extendleft setdefault insert")
CHANGING = ADDING | words("add update pop popleft popitem remove clear discard put put_nowait sort reverse")


def is_container(thing: Any) -> bool:
    """Something that keeps what is put into it."""
    if isinstance(thing, (Tensor, nn.Module)):
        return False
    if isinstance(thing, (MutableSequence, MutableSet, MutableMapping, deque)):
        return thing is not os.environ
    return type(thing).__module__ in ("queue", "multiprocessing.queues", "_queue")


def _name(thing: Any) -> str:
    return str(getattr(thing, "__name__", ""))


def _module(thing: Any) -> str:
    return str(getattr(thing, "__module__", "") or "")


def meaning(thing: Any) -> str:
    """ "rank", "size", "process", "collective", "random", "other random", "seed", "output", or "" for nothing of these.

    ``thing`` is the function or class that is called.
    """
    name, module, owner = _name(thing), _module(thing), getattr(thing, "__self__", None)
    if module.startswith("torch"):
        return _of_torch(thing, name, module)
    if owner is not None and owner.__class__.__module__.startswith(("numpy.random", "random")):
        return "seed" if name == "seed" else "other random"
    if module.startswith("numpy.random") or module in ("random", "secrets"):
        return "seed" if name == "seed" else "other random"
    if (module in ("time", "posix", "os", "_socket", "socket", "uuid", "platform", "nt")) and name in _CLOCK | _HOST:
        return "process"
    if name in ("now", "utcnow", "today") and "datetime" in str(owner):
        return "process"
    if thing is print or module.partition(".")[0] in _TRACKERS:
        return "output"
    if isinstance(owner, logging.Logger) or module == "logging":
        return "output" if name in _LOG else ""
    if name in _WRITES and module.partition(".")[0] in ("numpy", "pickle", "_pickle", "json", "safetensors", "pathlib"):
        return "output"
    if name in _WRITES and module.partition(".")[0] in ("matplotlib", "PIL", "pandas", "joblib", "yaml", "csv"):
        return "output"
    return ""


def _of_torch(thing: Any, name: str, module: str) -> str:
    if module.startswith("torch.distributed"):
        return "rank" if name in _RANKS else "size" if name in _SIZES else "collective" if name in _COLLECTIVES else ""
    if name in ("current_device", "device_count") and module.startswith(("torch.cuda", "torch.accelerator")):
        return "rank" if name == "current_device" else "size"
    if name in _DRAWS and getattr(torch, name, None) is thing:
        return "random"
    if name in _DRAWS_F and getattr(nn.functional, name, None) is thing:
        return "random"
    if module.startswith("torch.nn.init") and name.endswith("_"):
        fixed = ("zeros_", "ones_", "constant_", "eye_", "dirac_")
        return "" if name in fixed else "random"
    if name in ("manual_seed", "manual_seed_all", "seed", "seed_all", "set_rng_state"):
        return "seed"
    if name == "save" and module == "torch.serialization":
        return "output"
    return "output" if module.startswith("torch.utils.tensorboard") else ""


def prints_by_name(spelled: str, owner: Any) -> bool:
    """Output by a method whose function is not known: of a writer, a tracker, a file."""
    first, _, last = spelled.partition(".")[0], None, spelled.rpartition(".")[2]
    if first in _TRACKERS or last in _TRACKED or last in ("write_text", "write_bytes", "writelines", "writerow"):
        return True
    if owner is NOTHING:
        return first in ("logger", "logging", "log") and last in _LOG
    if last == "write":
        return hasattr(owner, "read") or hasattr(owner, "flush") or owner is sys.stdout
    return isinstance(owner, logging.Logger) and last in _LOG


def is_pure_module(thing: Any) -> bool:
    return isinstance(thing, nn.Module)


def draws_in_dropout(module: nn.Module) -> str:
    """The name of a dropout in ``module`` that is on; "" if there is none."""
    for found in module.modules():
        if isinstance(found, nn.modules.dropout._DropoutNd) and found.training and found.p > 0:
            return type(found).__name__
    return ""
