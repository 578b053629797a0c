"""The options of commands that run one model on several machines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime.paths import expanded

if TYPE_CHECKING:
    from mlx_redrafter.distributed.cluster import Cluster
    from mlx_redrafter.distributed.launch import Hosts
    from mlx_redrafter.distributed.split import Split

MACHINES = "Several machines"

HostNames = Annotated[
    str | None,
    typer.Option(
        "--hosts",
        rich_help_panel=MACHINES,
        metavar="NAME,...",
        help="Run on these machines, this one first.",
    ),
]
HostFile = Annotated[
    Path | None,
    typer.Option(
        "--hostfile",
        rich_help_panel=MACHINES,
        callback=expanded,
        help="The same, as mlx.distributed_config has it.",
    ),
]
Backend = Annotated[
    Literal["ring", "jaccl"] | None,
    typer.Option(
        rich_help_panel=MACHINES,
        help="TCP, or RDMA over Thunderbolt.",
        show_default="ring",
    ),
]


@dataclass(frozen=True)
class MachineOptions:
    """On which machines to run, and how they share the model."""

    hosts: HostNames = None
    hostfile: HostFile = None
    backend: Backend = None
    split: Annotated[
        Literal["auto", "tensor", "pipeline"],
        typer.Option(
            rich_help_panel=MACHINES,
            help="Cut every layer, or between layers.",
        ),
    ] = "auto"
    shares: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=MACHINES,
            metavar="N,...",
            help="Their parts, such as 2,1.",
            show_default="equal",
        ),
    ] = None

    @property
    def elsewhere(self) -> bool:
        """Has mlx.launch started this as another machine than the first?"""
        return os.environ.get("MLX_RANK", "0") != "0"

    @contextlib.contextmanager
    def joined(self) -> Iterator[tuple[Cluster, Split] | None]:
        """The machines, within; None: this one alone. On a machine that mlx.launch has started as
        another than the first, this is where it works, and ends.

        Raises:
            OptionError, ClusterError: what cannot be meant, or started.
        """
        given = given_hosts(self.hosts, self.hostfile, self.backend)
        elsewhere = given is None and "MLX_RANK" in os.environ
        if given is None and not elsewhere:
            if self.split != "auto" or self.shares is not None or self.backend is not None:
                raise OptionError(
                    "--split, --shares and --backend are for several machines: give --hosts too"
                )
            yield None
            return
        from mlx_redrafter.distributed import cluster, launched
        from mlx_redrafter.distributed.noise import without_noise
        from mlx_redrafter.distributed.split import Split, shares_of

        split = Split(self.split, shares_of(self.shares))
        if given is not None:
            split.for_size(len(given.hosts))
        without_noise()
        with cluster.start(given) if given is not None else launched.of_launched() as there:
            yield there, split


def given_hosts(names: str | None, file: Path | None, backend: Any = None) -> Hosts | None:
    """The machines of --hosts or --hostfile; raises OptionError, ClusterError."""
    if names is not None and file is not None:
        raise OptionError("--hosts and --hostfile are both given: give one of them")
    if names is None and file is None:
        return None
    from mlx_redrafter.distributed import launch

    if file is not None:
        return launch.from_file(file, backend)
    if backend == "jaccl":
        raise OptionError(
            "--backend jaccl needs to know which cable leads where: give --hostfile, as "
            "mlx.distributed_config --backend jaccl writes it"
        )
    return launch.named(names or "")
