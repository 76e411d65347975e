"""The commands about clusters: pools, doctor, dashboard, gc; and what a run costs and asks before it is submitted."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from launcher.errors import Exit, LaunchError, NotFinishedError, SiteError, UserError, printable
from launcher.manage import console, name_argument, output_option
from launcher.where import Where, where_options

if TYPE_CHECKING:
    from launcher.plan import Plan
    from launcher.pools import Pool


def manifest_text(plan: Plan, run_uri: str) -> str:
    """What `kubectl apply -f -` takes to start the run, as YAML."""
    import yaml

    from launcher.manifest import Submission, dry_suffix

    document = plan.to_json()
    order = Submission(plan.spec, plan.pool, document, run_uri, dry_suffix(document))
    objects = [order.config_map(), order.ray_job()]
    if plan.pool.site and plan.pool.site.namespace:
        for item in objects:
            item["metadata"]["namespace"] = plan.pool.site.namespace
    return str(yaml.dump_all(objects, Dumper=_dumper(), sort_keys=False, width=10_000))


def _dumper() -> Any:
    """Writes texts of several lines as such, so that the spec in the ConfigMap can be read."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return Dumper


def show_outlook(plan: Plan) -> None:
    """Says on what nodes, for how much, and whether they are there now."""
    from launcher import show

    if plan.layout is None:
        return
    from launcher.capacity import free_nodes, outlook
    from launcher.cluster import NODES, PODS

    free = None
    try:
        cluster = plan.pool.cluster()
        site = plan.pool.site
        assert site is not None
        nodes, pods = cluster.objects(NODES), cluster.objects(PODS, everywhere=True)
        free = free_nodes(nodes, pods, plan.layout.node_type, site.gpu_resource, plan.layout.offer)
    except SiteError:  # reading all nodes and pods is more than most may do
        pass
    show.layout_lines(plan, outlook(free, plan.layout), console())


def agree(plan: Plan, *, yes: bool) -> None:
    """Looks whether the cluster is ready, and asks before a run that may cost more than the pool lets pass unasked."""
    from launcher.doctor import before_submit

    layout, site = plan.layout, plan.pool.site
    if layout is None or site is None:
        return
    before_submit(plan.pool, plan.pool.cluster())
    if yes or layout.most is None or layout.most <= site.confirm_above:
        return
    cost = f"up to {layout.most:,.2f} {layout.currency} ({layout.price_per_hour:,.2f} an hour)"
    if not sys.stdin.isatty():
        raise UserError(f"the run may cost {cost}, more than {site.confirm_above:,.2f}", where=plan.pool.name,
                        hint="--yes agrees, --max-cost or --max-hours caps it")  # fmt: skip
    if not click.confirm(f"the run may cost {cost}; submit it?", err=True):
        raise UserError("nothing was submitted", hint="--max-cost or --max-hours caps the cost")


@click.command()
@where_options
@output_option
def pools(where: Where, output: str) -> None:
    """List what there is to run on, with free and total GPUs."""
    from launcher import show
    from launcher.pools import Pool, cluster_pools, find_pool

    rows: list[dict[str, Any]] = []
    here = find_pool("local")
    rows.append({"pool": "local", "node_type": "this machine", "cpus": here.cpus, "gpus": here.gpus, "free": here.gpus,
                 "gpu": here.gpu_type, "nodes": 1, "max_nodes": 1, "price_per_hour": 0.0, "spot_price": None,
                 "where": "", "trouble": ""})  # fmt: skip
    try:
        for name, found in cluster_pools(where.place):
            rows += _pool_rows(found) if isinstance(found, Pool) else [{"pool": name, "trouble": str(found)}]
    except LaunchError as error:
        rows.append({"pool": "", "trouble": f"{error}; {error.hint}"})
    if output == "json":
        click.echo(json.dumps(rows, indent=1))
    else:
        show.pools_table(rows, console(stderr=False))


def _pool_rows(pool: Pool) -> list[dict[str, Any]]:
    from launcher.capacity import free_nodes
    from launcher.cluster import NODES, PODS

    site = pool.site
    assert site is not None
    place, trouble = "", ""
    try:
        cluster = pool.cluster()
        place = cluster.where
        nodes, pods = cluster.objects(NODES), cluster.objects(PODS, everywhere=True)
    except LaunchError as error:
        nodes, pods, trouble = [], [], str(error)
    rows = []
    for kind in site.node_types:
        free = free_nodes(nodes, pods, kind, site.gpu_resource)
        offers = [None if offer is None else offer.price_per_hour for offer in (kind.on_demand, kind.spot)]
        rows.append({
            "pool": pool.name, "node_type": kind.name, "cpus": kind.cpus, "gpus": kind.gpus * kind.max_nodes,
            "free": None if trouble else sum(node.gpus for node in free), "gpu": kind.gpu_name,
            "nodes": None if trouble else len(free), "max_nodes": kind.max_nodes, "price_per_hour": offers[0],
            "spot_price": offers[1], "where": place, "trouble": trouble,
        })  # fmt: skip
    return rows


@click.command()
@where_options
@output_option
def doctor(where: Where, output: str) -> None:
    """Check what a run needs, here or with --cluster there, and say how to mend what is wrong."""
    from launcher import doctor as checks
    from launcher import show

    if where.cluster in (None, "local"):
        found = [*checks.machine(), checks.storage(where.root())]
    else:
        try:
            pool = where.pool()
            found = list(checks.cluster_checks(pool, pool.cluster()))
        except LaunchError as error:
            found = [checks.Check("pool", False, str(error), error.hint)]
    if output == "json":
        click.echo(json.dumps([asdict(check) for check in found], indent=1))
    else:
        show.checks(found, console(stderr=False))
    if any(check.ok is False for check in found):
        sys.exit(Exit.FAILED)


@click.command()
@name_argument
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Local port.  [default: a free one]")
@where_options
def dashboard(name: str, port: int, where: Where) -> None:
    """Open a way to Ray's dashboard of a run on a cluster, from this machine only, until Ctrl-C."""
    from launcher.tunnel import Tunnel

    here = where.run(name)
    pool = where.pool(here.pool())
    if pool.site is None:
        raise UserError("a run on this machine has no dashboard", where=name, hint=f"launch attach {name}")
    tunnel = Tunnel.to_dashboard(pool.cluster(), name, port)
    click.echo(f"http://127.0.0.1:{tunnel.port}")
    click.echo(f"token  {tunnel.token}  (the page asks for it once; Ctrl-C closes the way)", err=True)
    try:
        tunnel.serve()
    except KeyboardInterrupt:
        click.echo("", err=True)


@click.command()
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only list what would be removed.")
@where_options
@output_option
def gc(yes: bool, dry_run: bool, where: Where, output: str) -> None:
    """Find what runs left behind on a cluster though they should not have, and remove it."""
    import time

    from launcher import show
    from launcher.leaks import find_leaks, remove

    if where.cluster in (None, "local"):
        raise UserError("a run on this machine leaves nothing behind", where="--cluster", hint="name a pool")
    pool = where.pool()
    cluster = pool.cluster()
    assert pool.site is not None
    leaks = find_leaks(cluster, pool.site.gpu_resource, time.time())
    rows = [{"kind": leak.kind.plural, "name": leak.name, "run": leak.run, "gpus": leak.gpus, "why": leak.why}
            for leak in leaks]  # fmt: skip
    if output == "json":
        click.echo(json.dumps(rows, indent=1))
    else:
        show.leaks_table(rows, console(stderr=False))
    if dry_run or not leaks:
        return
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("there is no terminal to ask on", where="launch gc", hint="--yes removes them")
        if not click.confirm(f"remove {len(leaks)} objects and what they hold?", err=True):
            raise NotFinishedError("nothing was removed", where="launch gc", hint="--yes removes them")
    for leak in leaks:
        remove(cluster, leak)
        click.echo(printable(f"removed {leak.kind.plural} {leak.name}"), err=True)


COMMANDS = (pools, doctor, dashboard, gc)
