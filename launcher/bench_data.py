"""The command `launch bench-data`: whether this node can feed its GPUs from a data set, and what limits it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import click

from launcher.datasets import index_of, train_extra
from launcher.manage import console, output_option

if TYPE_CHECKING:
    from trainers.data.bench import Rates


@click.command("bench-data")
@click.argument("uri")
@click.option("--image-size", type=click.IntRange(8, 2048), default=224, show_default=True,
              help="Side of the square that the model sees, in pixels.")  # fmt: skip
@click.option("--model", metavar="NAME", help="Also measure how fast this timm model trains on the device here.")
@click.option("--need", type=click.FloatRange(min=0, min_open=True), metavar="IMAGES/S",
              help="What the GPUs of this node take, if you know it.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(2), default=64, show_default=True, help="Images of a step.")
@click.option("--threads", type=click.IntRange(1), help="Cores to read with; all of them if left out.")
@click.option("--images", type=click.IntRange(1), default=1000, show_default=True, help="How many to look at, at most.")
@click.option("--seconds", type=click.FloatRange(0.1, 600), default=5.0, show_default=True,
              help="How long to crop, and to train.")  # fmt: skip
@output_option
def bench_data(
    uri: str, image_size: int, model: str | None, need: float | None, batch_size: int, threads: int | None,
    images: int, seconds: float, output: str,
) -> None:  # fmt: skip
    """Measure how fast this node reads a data set, and whether that feeds its GPUs.

    URI is what --data takes. A part of it is fetched, decoded and cropped as in a run, in caches that go afterwards.
    """
    index = index_of(uri)
    with train_extra():
        from trainers.data.bench import measure, training_rate

        err = console()
        rates = measure(index, image_size, images=images, seconds=seconds, threads=threads or os.cpu_count() or 1,
                        batch_size=batch_size, tell=lambda stage: err.print(f"{stage} ..."))  # fmt: skip
        trains = None
        if model is not None:
            err.print("training ...")
            trains = training_rate(model, len(index.classes), image_size, batch_size, seconds)
    document = {"uri": index.uri, "images_in_all": len(index.table), **rates.document(),
                "need": need or trains, "waits": _waits(rates, need or trains)}  # fmt: skip
    if output == "json":
        click.echo(json.dumps(document, indent=1))
    else:
        _page(document, model)


def _waits(rates: Rates, need: float | None) -> dict[str, float] | None:
    """Share of its time that a GPU would wait for data, which it takes at `need` images a second."""
    if need is None:
        return None
    return {
        "first_epoch": max(1 - rates.first_epoch / need, 0.0),
        "later_epochs": max(1 - rates.later_epochs / need, 0.0),
    }


def _page(found: dict[str, Any], model: str | None) -> None:
    from launcher.plan import count
    from launcher.show import say, size

    out = console(stderr=False)
    bad = f"; {count(found['unreadable'], 'image')} cannot be read" if found["unreadable"] else ""
    say(out, "data", f"{found['uri']}: {found['images']:,} of {count(found['images_in_all'], 'image')} looked at{bad}")
    say(out, "node", count(found["threads"], "thread"))
    say(out, "fetching", f"{_rate(found['fetch'])}, {found['megabytes']:,.0f} MB/s")
    say(out, "decoding", _rate(found["decode"]))
    say(out, "cropping", _rate(found["crop"]))
    first, later = found["limit"]
    decoded = size(int(found["pixel_bytes"] * found["images_in_all"]))
    say(out, "epoch 1", f"about {_rate(found['first_epoch'])}, limited by {first}")
    say(out, "later", f"about {_rate(found['later_epochs'])}, limited by {later}")
    say(out, "", f"decoded the images take {decoded}, of which {found['held']:.0%} can be kept")
    if found["need"] is None:
        say(out, "next", "--model NAME or --need IMAGES/S says whether that is enough")
        return
    what = f"{model} trains on" if model else "wanted are"
    say(out, "need", f"{what} {_rate(found['need'])}")
    for key, span in (("first_epoch", "in the first epoch"), ("later_epochs", "in later ones")):
        waits = found["waits"][key]
        words = f"waits for data {waits:.0%} of the time" if waits else "never waits"
        say(out, "", f"the device {words} {span}", "yellow" if waits else "green")


def _rate(images: float) -> str:
    return f"{images:,.0f} images/s"


COMMANDS = (bench_data,)
