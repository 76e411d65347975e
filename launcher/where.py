"""Where a command looks for its run or pool: the options that say so, and the run and backend they lead to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.errors import LaunchError, NotFoundError

if TYPE_CHECKING:
    from launcher.backends import Backend
    from launcher.pools import Place, Pool
    from launcher.runs import Run

storage_option = click.option(
    "--storage", help="Folder or s3:// prefix of the runs.  [default: the pool's, $RAYLAUNCH_STORAGE, or ~/raylaunch]"
)


@dataclass(frozen=True)
class Where:
    """What `--storage`, `--cluster`, `--context`, `--namespace` and `--pool-file` say; None is the usual."""

    storage: str | None = None
    cluster: str | None = None
    context: str | None = None
    namespace: str | None = None
    pool_file: Path | None = None

    @property
    def place(self) -> Place:
        """Where to look for pools."""
        from launcher.pools import Place

        return Place(self.context, self.namespace, self.pool_file)

    def pool(self, name: str | None = None) -> Pool:
        """The pool of that name, or of `--cluster`; this machine if neither is given."""
        from launcher.pools import find_pool

        return find_pool(name or self.cluster or "local", self.place)

    def root(self) -> str:
        """The storage that is meant."""
        from launcher.preflight import whole
        from launcher.runs import default_storage

        if self.storage is None and self.cluster not in (None, "local"):
            site = self.pool().site
            assert site is not None
            return site.storage
        return whole(self.storage or default_storage())

    def run(self, name: str) -> Run:
        """The run of that name, or `NotFoundError`. Where no place is given, the pools in reach are asked too."""
        from launcher.runs import find

        try:
            return find(self.root(), name)
        except NotFoundError:
            if self.storage is None and self.cluster is None:
                with suppress(LaunchError):  # no cluster in reach: what was said first still holds
                    if found := self._search(name):
                        return found
            raise

    def engine(self, run: Run) -> Backend:
        """The backend that carries the run out; for one that is over and whose cluster is gone, this machine's."""
        from launcher.backends import backend
        from launcher.pools import find_pool

        try:
            return backend(self.pool(run.pool()))
        except LaunchError:
            if not run.state().status.final:
                raise
            return backend(find_pool("local"))

    def reader(self, run: Run) -> Backend:
        """`engine` for commands that only read: what is over is told by the run directory alone."""
        from launcher.backends import backend
        from launcher.pools import find_pool

        return backend(find_pool("local")) if run.state().status.final else self.engine(run)

    def _search(self, name: str) -> Run | None:
        from launcher.pools import Pool, cluster_pools
        from launcher.runs import Run
        from launcher.spec import valid_name

        if not valid_name(name):
            return None
        storages = {pool.site.storage for _, pool in cluster_pools(self.place) if isinstance(pool, Pool) and pool.site}
        runs = (Run(storage, name) for storage in sorted(storages))
        return next((run for run in runs if run.exists()), None)


def where_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of `Where`; the command gets one argument `where`."""
    names = ("storage", "cluster", "context", "namespace", "pool_file")

    @functools.wraps(command)
    def called(**given: Any) -> Any:
        return command(where=Where(**{name: given.pop(name) for name in names}), **given)

    options = (
        storage_option,
        click.option("--cluster", envvar="RAYLAUNCH_CLUSTER", metavar="POOL",
                     help="Kubernetes pool, as `launch pools` lists it.  [default: this machine]"),
        click.option("--context", help="Context of the kubeconfig.  [default: the current one]"),
        click.option("-n", "--namespace", help="Namespace of the pool.  [default: the context's]"),
        click.option("--pool-file", type=click.Path(path_type=Path), help="Pools described on this machine.  "
                     "[default: ~/.config/raylaunch/pools.yaml]"),
    )  # fmt: skip
    for option in reversed(options):
        called = option(called)
    return called
