"""``python -m benchmarks.demo_sweep FOLDER PART ...``: what the demos leave open, by runs that differ from a demo's in a few options.

FOLDER is that of a finished ``make demo`` or ``make demo-real``: its tokenizer, text and teacher serve every run, and a
run in which nothing is different is the demo's own. The parts are in :mod:`benchmarks.demo_runs`. Finished runs are
reused, a stopped one goes on, and each row is kept as soon as it is measured: in
``benchmarks/results/demo-sweep-cpu.json`` or ``demo-real-sweep-cpu.json``, from which docs/demonstration.md is filled.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.utils import logging

from benchmarks import demo, pages
from benchmarks.demo_runs import DEMO, NARROW, PARTS, TARGETS, TEXT, Part, Run
from benchmarks.demo_tables import load, path_of
from kdkernels.commands import cache
from kdkernels.teacher_cache import TeacherCache
from kdkernels.trainer import compare, data, judge, train
from kdkernels.trainer.command_line import resolve
from kdkernels.trainer.files import write_whole
from kdkernels.trainer.folder import COMPARISON, CONFIG, RESULT
from kdkernels.trainer.settings import SCRATCH, WAYS, Settings

#: Ids that the cache keeps of the teacher's distribution.
TOP_K = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="a demo's output folder")
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all of the demo's")
    folder, parts = vars(parser.parse_args()).values()
    logging.disable_progress_bar()
    if folder is not None:
        finished = Demo(folder)
        there = PARTS[finished.name]
        if unknown := set(parts) - set(there):
            parser.error(f"{finished.name} has no part {', '.join(unknown)}; it has {', '.join(there)}")
        for part in parts or there:
            finished.measure(part)
    for name, text in demo.committed().items():
        pages.fill(name, text)


class Demo:
    """A finished demo."""

    def __init__(self, folder: Path) -> None:
        comparison = json.loads((folder / COMPARISON).read_text())
        self.environment, values = comparison["environment"], comparison["settings"]
        options = {name: value for name, value in values.items() if name != "mode"}
        self.settings = resolve("compare", {**options, "ways": list(WAYS), "output_dir": str(folder)})
        self.name = "demo" if self.settings.model.teacher in SCRATCH else "demo-real"
        self.stages = compare.plan(self.settings)
        if "longer" in options["ways"]:
            self.stages["longer"] = compare.longer(self.stages)

    @cached_property
    def given(self) -> train.Ingredients:
        return train.ingredients(self.stages["soft"])

    @cached_property
    def teacher(self) -> Any:
        return self.given.teacher()

    def measure(self, name: str) -> None:
        """A row for each run of a part, kept as soon as it is there."""
        part = PARTS[self.name][name]
        if name == "cache":
            self.keep(name, "written", self.write_cache())
        if name == "sizes":
            self.write_narrow()
        for number, run in enumerate(part.runs, 1):
            stage = self.varied(run, name)
            reused = compare.run_stage(number, len(part.runs), run.name, stage)
            self.keep(name, run.name, self.row(stage, part), reused=reused, own=stage in self.stages.values())

    def keep(
        self, part: str, name: str, value: dict[str, Any], *, reused: bool = False, own: bool = False
    ) -> None:
        """With the machine that measured it: of a run that was there before, the one that is known already."""
        result = load(self.name)
        rows = result.setdefault(part, {})
        before = rows.get(name, {}).get("environment") or (self.environment if own else None)
        environment = (before if reused else None) or compare.environment(self.settings)
        rows[name] = {"environment": environment, **value}
        write_whole(path_of(self.name), json.dumps(result, indent=1) + "\n")

    def varied(self, run: Run, part: str) -> Settings:
        stage = self.stages[run.way]
        changed = {name: self.placed(value) for name, value in run.changed.items()}
        if all(stage.asked[name] == value for name, value in changed.items()):
            return stage
        folder = self.settings.output_dir / "sweep" / part / run.name
        own = {"output_dir": str(folder), "resume": (folder / CONFIG).exists()}
        return resolve(stage.mode, {**stage.asked, **changed, **own})

    def placed(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.placed(each) for each in value]
        return value.replace(DEMO, str(self.settings.output_dir)) if isinstance(value, str) else value

    def row(self, stage: Settings, part: Part) -> dict[str, Any]:
        """What a run cost and came to, by the demo's own held-out text."""
        options = {name: stage.asked[name] for name in part.options if name in stage.to_dict()}
        row = {"options": options, **compare.speed(stage)}
        if not part.judged:
            return {
                **row,
                "validation_loss": json.loads((stage.output_dir / RESULT).read_text())["eval_hard"],
            }
        path = stage.output_dir / compare.JUDGED
        if not path.exists():
            prompts = self.settings.compare.judged_prompts
            judged = judge.judged(self.given, self.teacher, compare.model_folder(stage), prompts)
            write_whole(path, json.dumps(judged, indent=1))
        return {**row, **json.loads(path.read_text())}

    def write_cache(self) -> dict[str, Any]:
        """The teacher's targets over as much text as a student reads: what they took and what they take."""
        text, targets = Path(self.placed(TEXT)), Path(self.placed(TARGETS))
        done = targets.with_name("written.json")
        if not done.exists():
            shutil.rmtree(targets, ignore_errors=True)  # half a cache has no time
            stage = self.stages["soft"]
            self.write_text(text)
            settings = cache.CacheSettings(
                teacher=str(stage.model.teacher),
                out=str(targets),
                top_k=TOP_K,
                tokenizer=stage.model.tokenizer,
                dtype=stage.model.dtype,
            )
            start = time.perf_counter()
            cache.run(settings, dataclasses.replace(stage.data, data=[str(text)]))
            seconds, written = time.perf_counter() - start, TeacherCache(targets)
            size = {"bytes_per_token": written.bytes / written.tokens, "tokens": written.tokens}
            where = compare.environment(self.settings)
            write_whole(done, json.dumps({"top_k": TOP_K, "seconds": seconds, "environment": where, **size}))
        return json.loads(done.read_text())

    def write_narrow(self) -> None:
        """Students from scratch whose first weights have transformers' deviation, the same for all widths."""
        for path, size in NARROW.items():
            folder = Path(self.placed(path))
            if not folder.exists():
                model = self.given.model(size, self.settings.run.seed)
                model.config.initializer_range = type(model.config)().initializer_range
                set_seed(self.settings.run.seed)
                half = folder.with_suffix(".half")
                type(model)(model.config).save_pretrained(half)
                self.given.tokenizer.save_pretrained(half)
                half.rename(folder)

    def write_text(self, path: Path) -> None:
        """Pieces from all over the demo's training text, each a sequence with its end of text; and the share that is held out."""
        run, share = self.settings.run, self.settings.data.validation_share
        batch = run.train_batch_size * run.gradient_accumulation_steps
        pieces = data.limited(self.given.train, round(run.max_steps * batch / (1 - share)) + 1)
        texts = [self.given.tokenizer.decode(ids[:-1]) for ids, _ in pieces.rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


if __name__ == "__main__":
    main()
