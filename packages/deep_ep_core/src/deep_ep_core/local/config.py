"""Owns what a local launch can be asked for, and the environment of a rank that follows from it.

It starts nothing and looks for nothing: it is given the GPUs and the port.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from deep_ep_core.errors import ConfigError
from deep_ep_core.local.gpus import SHARED_GPU_DEFAULTS, visible_devices
from deep_ep_core.local.mps import MpsMode

__all__ = ["LOOPBACK_ADDRESS", "Device", "LaunchConfig", "rank_environment"]

LOOPBACK_ADDRESS = "127.0.0.1"

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """How many ranks to start on this machine, and how they are to see it.

    Attributes:
        num_ranks: Number of processes.
        num_nodes: Number of make-believe nodes that the ranks are cut into, in rank order. On GPUs, several nodes get a
            make-believe network too (`deep_ep_core.loopback`), unless the user's environment chooses one.
        num_threads: Value of OMP_NUM_THREADS in a rank, unless the user's environment sets it.
        device: `cuda` gives rank r the GPU r % num_gpus, which its script finds as `LOCAL_RANK % device_count`. `cpu`
            sets nothing about GPUs; the script may use them by itself.
        mps: Whether ranks that share a GPU run on it at the same time, through an MPS daemon of this launch. `auto`
            starts one where ranks share a GPU, and does without where it cannot; `on` fails where it cannot; with
            `off` the ranks of a GPU take turns.

    Raises:
        ConfigError: A number is below 1, the nodes would not be equally large, a word is not one of those above, or
            MPS is asked for without GPUs.
    """

    num_ranks: int
    num_nodes: int = 1
    num_threads: int = 1
    device: Device = "cpu"
    mps: MpsMode = "auto"

    def __post_init__(self) -> None:
        for name in ("num_ranks", "num_nodes", "num_threads"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} must be at least 1 (got {value})")
        if self.num_ranks % self.num_nodes != 0:
            raise ConfigError(
                f"num_ranks must be a multiple of num_nodes (got {self.num_ranks} ranks on {self.num_nodes} nodes); "
                "every node holds the same number of ranks"
            )
        for name, words in (("device", get_args(Device)), ("mps", get_args(MpsMode))):
            if getattr(self, name) not in words:
                raise ConfigError(f"{name} must be one of {', '.join(words)} (got {getattr(self, name)!r})")
        if self.mps == "on" and self.device != "cuda":
            raise ConfigError(f'mps="on" needs device="cuda" (got {self.device!r}); MPS is for ranks that share a GPU')

    @property
    def num_ranks_per_node(self) -> int:
        """Number of ranks of each make-believe node."""
        return self.num_ranks // self.num_nodes


def rank_environment(
    config: LaunchConfig, rank: int, *, master_port: int, base: Mapping[str, str], gpus: Sequence[str] = ()
) -> dict[str, str]:
    """The environment of one rank: `base`, the variables that torchrun would set, and those of its GPU.

    Args:
        config: The launch.
        rank: The rank, in [0, num_ranks).
        master_port: Port of the rendezvous store that the starting process holds.
        base: The user's environment.
        gpus: UUIDs of the GPUs of the launch; empty where nothing is to be set about GPUs.

    Returns:
        A new mapping. `OMP_NUM_THREADS`, `GLOO_SOCKET_IFNAME` and the names of `SHARED_GPU_DEFAULTS` are kept where
        `base` sets them.
    """
    node, local_rank = divmod(rank, config.num_ranks_per_node)
    environment = dict(base)
    environment.update(
        RANK=str(rank),
        WORLD_SIZE=str(config.num_ranks),
        LOCAL_RANK=str(local_rank),
        LOCAL_WORLD_SIZE=str(config.num_ranks_per_node),
        GROUP_RANK=str(node),
        NODE_RANK=str(node),
        GROUP_WORLD_SIZE=str(config.num_nodes),
        ROLE_NAME="default",
        ROLE_RANK=str(rank),
        ROLE_WORLD_SIZE=str(config.num_ranks),
        MASTER_ADDR=LOOPBACK_ADDRESS,
        MASTER_PORT=str(master_port),
        # The store belongs to the starting process: no rank hosts one, and it outlives every rank.
        TORCHELASTIC_USE_AGENT_STORE=str(True),
        TORCHELASTIC_RESTART_COUNT="0",
        TORCHELASTIC_MAX_RESTARTS="0",
        TORCHELASTIC_RUN_ID="local",
        # Lines arrive when they are printed, and SIGABRT prints the Python stacks.
        PYTHONUNBUFFERED="1",
        PYTHONFAULTHANDLER="1",
    )
    if config.num_nodes > 1:
        environment["NCCL_LSA_TEAM_SIZE"] = str(config.num_ranks_per_node)
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = visible_devices(gpus, node * config.num_ranks_per_node)
        if config.num_ranks > len(gpus):
            for name, value in SHARED_GPU_DEFAULTS.items():
                environment.setdefault(name, value)
    environment.setdefault("OMP_NUM_THREADS", str(config.num_threads))
    # Otherwise gloo looks up the machine's own name, which need not resolve.
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment
