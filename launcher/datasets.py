"""The commands about data sets: `launch data stats` says what one is, `launch data pack` copies one into shards."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from launcher.errors import Exit, SiteError, UserError, printable
from launcher.manage import console, output_option

if TYPE_CHECKING:
    from trainers.data.index import Index
    from trainers.data.pack import Pack

SHOWN = 20
"""Classes and bad images that a table names; JSON has all."""


@click.group("data")
def data() -> None:
    """Look at a data set, or pack it into shards."""


def _data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How the data is split, as in a run."""
    share = click.FloatRange(0, 1, min_open=True, max_open=True)
    command = click.option("--val-split", help="Name of the split to validate on.")(command)
    return click.option(
        "--val-fraction", type=share, default=0.2, show_default=True,
        help="Share of each class held out, where the data has no validation split.",
    )(command)  # fmt: skip


def index_of(uri: str, val_fraction: float = 0.2, val_split: str | None = None) -> Index:
    """The index of the data that a person named."""
    from launcher.preflight import whole
    from launcher.spec import Data
    from trainers.data.index import build_index

    return build_index(Data(uri=whole(uri), val_fraction=val_fraction, val_split=val_split))


@contextmanager
def train_extra(hint: str = "") -> Iterator[None]:
    """Says what to install where an import fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise SiteError(f"reading images needs {error.name}", hint=f"pip install 'raylaunch[train]'{hint}") from None


@data.command()
@click.argument("uri")
@click.option("--sample", type=click.IntRange(0), default=200, show_default=True, help="Images to look into.")
@click.option("--all", "every", is_flag=True, help="Look into all images, and find those that are there twice.")
@_data_options
@output_option
def stats(uri: str, sample: int, every: bool, val_fraction: float, val_split: str | None, output: str) -> None:
    """Say what a data set holds, and whether to pack it.

    URI is what --data takes. All images are counted, and some are decoded (--sample 0: none).
    """
    index = index_of(uri, val_fraction, val_split)
    from trainers.data.stats import contents, summary

    document = summary(index)
    if every or sample:
        with train_extra(", or --sample 0"):
            document["contents"] = contents(index, None if every else sample)
    if output == "json":
        click.echo(json.dumps(document, indent=1))
    else:
        _stats_page(document, uri)


def _stats_page(document: dict[str, Any], uri: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from launcher.plan import count
    from launcher.show import say, size

    out = console(stderr=False)
    splits = [split for split, number in document["splits"].items() if number]
    ignored = f"; {count(document['ignored'], 'other file')}" if document["ignored"] else ""
    say(out, "data", document["uri"])
    say(
        out,
        "images",
        f"{document['images']:,} in {len(document['classes'])} classes, {size(document['bytes'])}{ignored}",
    )
    say(out, "splits", ", ".join(f"{document['splits'][split]:,} {split}" for split in splits))
    say(out, "files", _spread(document["file_bytes"], size))
    if "contents" in document:
        _contents_page(document["contents"], out)
    uneven = document["imbalance"]
    if uneven["ratio"] > 1:
        say(out, "balance", f"{uneven['largest']} has {uneven['ratio']:g} times the training images of "
                            + "; ".join(filter(None, (uneven["smallest"], uneven["advice"]))))  # fmt: skip
    pays = document["packing"]["pays"]
    say(out, "packing", f"{'pays' if pays else 'does not pay'}: {document['packing']['why']}")
    if pays:
        say(out, "next", f"launch data pack {shlex.quote(uri)} s3://…")
    table = Table("class", *splits, box=None, padding=(0, 2, 0, 0), header_style="bold")
    ranked = sorted(document["classes"].items(), key=lambda pair: -pair[1]["train"])
    for label, counts in ranked[:SHOWN]:
        table.add_row(Text(printable(label)), *(f"{counts[split]:,}" for split in splits))
    out.print(table)
    if len(ranked) > SHOWN:
        out.print(f"and {len(ranked) - SHOWN:,} smaller classes; -o json has all")


def _contents_page(found: dict[str, Any], out: Any) -> None:
    from launcher.plan import count
    from launcher.show import say, size

    seen = "all images" if found["all"] else f"{found['looked_at']:,} images by chance"
    say(out, "seen", seen)
    if "formats" in found:
        say(out, "", "; ".join(", ".join(f"{value} {name}" for name, value in found[key].items())
                               for key in ("formats", "modes")))  # fmt: skip
        say(out, "", f"width {_spread(found['width'], lambda value: f'{value:g}')}; "
                     f"height {_spread(found['height'], lambda value: f'{value:g}')}")  # fmt: skip
        say(out, "", f"turned by EXIF {found['rotated']:.1%}; "
                     f"{'' if found['all'] else 'about '}{size(found['decoded_bytes'])} decoded in full")  # fmt: skip
    bad = found["unreadable"]
    say(out, "bad", f"{len(bad):,} of them cannot be read" if bad else "none", "bold red" if bad else "bold")
    for image in bad[:SHOWN]:
        say(out, "", f"{image['key']}: {image['why']}")
    if "duplicates" in found:
        twice = found["duplicates"]
        say(out, "twice", f"{count(twice['images'], 'image')} with the content of another")
        for key, words in (("in_several_splits", "in several splits"), ("of_several_classes", "of several classes")):
            if twice[key]:
                say(out, "", f"{len(twice[key]):,} {words}, such as {' = '.join(twice[key][0])}", "bold red")


def _spread(values: dict[str, float], text: Callable[[float], str]) -> str:
    return ", ".join(f"{name} {text(value)}" for name, value in values.items())


@data.command()
@click.argument("src")
@click.argument("dst")
@click.option("--shard-mb", type=click.IntRange(1, 4096), default=128, show_default=True,
              help="Size of a shard, in MiB.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True,
              help="Of the order of the images.")  # fmt: skip
@click.option("--check", is_flag=True, help="Decode each image, and leave out those that cannot be read.")
@click.option("--verify/--no-verify", default=True, show_default=True,
              help="Read all shards back at the end and compare checksums.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only say what would be written.")
@_data_options
@output_option
def pack(
    src: str, dst: str, shard_mb: int, seed: int, check: bool, verify: bool, dry_run: bool, val_fraction: float,
    val_split: str | None, output: str,
) -> None:  # fmt: skip
    """Copy the images at SRC into tar shards at DST.

    SRC is what --data takes; DST is a folder or an s3:// prefix, and then what --data takes, with the same images,
    classes, splits and weights. If it is broken off, the same command goes on; if all is there, it verifies it again.

    \b
    launch data pack s3://bucket/flowers s3://bucket/flowers-packed
    """
    from launcher.preflight import whole

    _check_apart(whole(src), whole(dst))
    index = index_of(src, val_fraction, val_split)
    with train_extra(""):
        from trainers.data.pack import Options, Pack

        made = Pack(index, whole(dst), Options(shard_mb, seed, check))
    if not dry_run:
        _make(made, verify)
    _pack_page(made, index, output, dry_run, verify)


def _check_apart(src: str, dst: str) -> None:
    """Raises `UserError` for shards that would become part of what they are made from."""
    ends = [place if "://" in place else os.path.realpath(place) for place in (src, dst)]
    inner, outer = f"{ends[1].rstrip('/')}/", f"{ends[0].rstrip('/')}/"
    if inner.startswith(outer):
        raise UserError("DST lies in SRC, and would become a part of it", where=dst, hint="choose a place beside it")


def _make(made: Pack, verify: bool) -> None:
    from launcher.show import say

    total, before = len(made.plan), len(made.done)
    if before and not made.finished:
        say(console(), "pack", f"goes on: {before:,} of {total:,} shards are there")
    try:
        with _progress(made) as tell:
            made.make(tell, verify=verify)
    except KeyboardInterrupt:
        click.echo(f"\ninterrupted; {len(made.done):,} of {total:,} shards are written", err=True)
        click.echo("next:  the same command goes on", err=True)
        sys.exit(Exit.INTERRUPTED)


@contextmanager
def _progress(made: Pack) -> Iterator[Callable[[str, int, str], None]]:
    """A live line on a terminal, a line for each shard elsewhere."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    out = console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
               TimeRemainingColumn())  # fmt: skip
    totals = {"packing": made.expected(made.missing), "verifying": made.expected(list(made.plan))}
    shards: dict[str, list[str]] = {"packing": [*made.done], "verifying": []}
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as live:
        tasks = {what: live.add_task(what, total=size or None, visible=False) for what, size in totals.items()}

        def tell(what: str, more: int, shard: str) -> None:
            live.update(tasks[what], advance=more, visible=True)
            if shard:
                shards[what].append(shard)
                if not out.is_terminal:
                    click.echo(f"{what}  {shard}  {len(shards[what]):,} of {len(made.plan):,}", err=True)

        yield tell


def _pack_page(made: Pack, index: Index, output: str, dry_run: bool, verify: bool) -> None:
    from launcher.show import say, size

    out, facts = console(), index.facts()
    splits = {split: facts[split] for split in ("train", "val", "test") if facts[split]}
    document: dict[str, Any] = {"uri": made.uri, "finished": made.finished} | made.document()
    if dry_run:
        document |= {"planned": [{"name": name, "images": len(rows), "size": made.expected([name])}
                                 for name, rows in made.plan.items()]}  # fmt: skip
        missing = made.missing
        say(out, "pack", made.uri)
        say(out, "images", f"{facts['images']:,} in {facts['classes']} classes: "
                           + ", ".join(f"{count:,} {split}" for split, count in splits.items()))  # fmt: skip
        say(out, "shards", f"{len(made.plan):,} of about {size(made.expected(list(made.plan)) / len(made.plan))}; "
                           f"{len(missing):,} to write, {size(made.expected(missing))}")  # fmt: skip
    else:
        say(out, "packed", f"{document['images']:,} images, {size(document['bytes'])}, in {len(made.plan):,} shards"
                           + (", verified" if verify else ""))  # fmt: skip
        left_out = [image for shard in document["shards"] for image in shard["left_out"]]
        if left_out:
            say(out, "left out", f"{len(left_out):,} that cannot be read; pack.json names them", "bold yellow")
        say(out, "next", f"launch --data {shlex.quote(made.uri)}")
    if output == "json":
        click.echo(json.dumps(document, indent=1))


COMMANDS = (data,)
