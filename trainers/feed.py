"""The data engine of a run, put together as its spec says: files, pixels, recipes, batches. It reads nothing itself."""

from __future__ import annotations

from launcher.spec import Spec
from trainers.data.decoded import Decoded
from trainers.data.index import Index
from trainers.data.loader import Loader
from trainers.data.recipes import EvalRecipe, TrainRecipe, reduction
from trainers.data.source import Source
from trainers.guards import Team
from trainers.model import Preprocess


class Feed:
    """What one rank of a run reads its images with.

    Attributes:
        source: the files.
        reduction: how far images shrink when they are decoded.
        loader: the batches.
    """

    def __init__(self, spec: Spec, index: Index, preprocess: Preprocess, team: Team, *, pinned: bool) -> None:
        side = preprocess.image_size
        training = TrainRecipe(spec.augment, side)
        evaluation = EvalRecipe(side, preprocess.crop_pct, preprocess.interpolation)
        self.reduction = reduction(training, evaluation)
        self.source = Source(index, budget=_bytes(spec.data.cache_gb))
        self.loader = Loader(
            Decoded(self.source, self.reduction, budget=_bytes(spec.data.pixels_gb)),
            training=training,
            evaluation=evaluation,
            augment=spec.augment,
            seed=spec.train.seed,
            batch_size=spec.train.batch_size or 1,
            accumulate=spec.train.accumulate,
            rank=team.rank,
            world=team.world,
            threads=spec.resources.cpus_per_worker or 1,
            sampling=spec.data.sampling,
            pinned=pinned,
            max_bad_fraction=spec.data.max_bad_fraction,
        )


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * 1e9)
