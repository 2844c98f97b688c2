"""What the metrics of an evaluation share, and the evaluations of one training run: real images,
their classifier, compiled programs, and collections of features that resume after a stop."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from ddpm_jax.data.datasets import Source, open_source
from ddpm_jax.evaluation import classifier, collect
from ddpm_jax.evaluation.options import StoppedError
from ddpm_jax.evaluation.progress import Progress
from ddpm_jax.parallel.runners import Runner
from ddpm_jax.storage import files


class Splits(Mapping):
    """{split: Source} of all splits of a data set, each opened when it is first needed. Raises
    UserError where one cannot be read, KeyError for a name that the data set does not have."""

    def __init__(self, name: str, data_dir: str | None, image_shape: tuple):
        self.name, self._data_dir, self._image_shape = name, data_dir, image_shape
        self._opened: dict[str, Source] = {}

    def _open(self, split) -> Source:
        if split not in self._opened:
            self._opened[split] = open_source(
                self.name, self._data_dir, split, image_size=self._image_shape[0],
                channels=self._image_shape[2])
        return self._opened[split]

    def __getitem__(self, split) -> Source:
        if split not in self._open("train").splits:
            raise KeyError(split)
        return self._open(split)

    def __iter__(self):
        return iter(self._open("train").splits)

    def __len__(self):
        return len(self._open("train").splits)


@dataclasses.dataclass
class Session:
    """sources: the real images to compare with, None where no data set is named; folder: where
    finished shards are kept for a resume (None: nowhere); stop: .requested(batch), polled between
    batches; say: receives lines about the progress."""
    runner: Runner
    sources: Splits | None = None
    folder: str | None = None
    stop: Any = None
    say: Callable[[str], None] = lambda text: None
    programs: dict[tuple, Callable] = dataclasses.field(default_factory=dict)
    features: dict[tuple, dict] = dataclasses.field(default_factory=dict)
    classifiers: dict[str | None, classifier.Stored | None] = dataclasses.field(
        default_factory=dict)

    def program(self, key: tuple, build: Callable) -> Callable:
        """build(), kept under ``key``: an evaluation repeated in training traces nothing again."""
        if key not in self.programs:
            self.programs[key] = build()
        return self.programs[key]

    def classifier(self, folder: str | None) -> classifier.Stored | None:
        """The classifier of the training split (see classifier.shared)."""
        if folder not in self.classifiers:
            self.classifiers[folder] = classifier.shared(
                self.sources["train"], folder=folder, say=self.say)
        return self.classifiers[folder]

    def collect(self, name: str, producer: Callable, *, num: int, batch: int, request: dict,
                keep: bool = False) -> dict:
        """All rows of producer() over ``num`` images, on process 0 (elsewhere {}): a folder of
        shards for each request. keep: also in memory, for the next evaluation. Raises StoppedError.
        """
        name_and_key = f"{name}-{collect.key(request)}"
        if (name_and_key, num) in self.features:
            return self.features[name_and_key, num]
        started, progress = time.monotonic(), Progress(self.say, name)
        found = collect.collect(
            producer(), num=num, batch=batch, request=request, stop=self.stop, what=name,
            folder=self.folder and files.join(self.folder, name_and_key),
            progress=lambda done: progress(done, num))
        if found is None:
            raise StoppedError
        self.say(f"{name}: {num} images, {time.monotonic() - started:.1f} s")
        if keep:
            self.features[name_and_key, num] = found
        return found


def session_of(exp, data_dir=None, **fields) -> Session:
    """The Session of an Experiment, with the data set of its config (in ``data_dir``, if given)."""
    data = exp.config.data
    return Session(exp.runner, Splits(data.name, data_dir or data.dir, exp.image_shape), **fields)
