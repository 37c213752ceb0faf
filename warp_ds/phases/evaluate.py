"""Evaluation: refusals, over-refusals, exact match and loss, under ZeRO-3 on any number of ranks, same results."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from warp_ds.cluster import consensus, processes
from warp_ds.cluster.preemption import leave_if_asked
from warp_ds.data.datasets import load_prompts, load_samples
from warp_ds.data.lengths import encode_dataset
from warp_ds.data.sample import Sample, as_samples
from warp_ds.errors import ConfigError, DataError
from warp_ds.evaluation.generate import answer_surprise, generate_greedy, loss_per_token, noise_threshold, pad_token
from warp_ds.evaluation.judge import Judge, judge_all
from warp_ds.evaluation.metrics import agreement, exact_match, mcnemar, number_value, same_value, wilson
from warp_ds.evaluation.movement import mean_movement, movement, open_basis
from warp_ds.evaluation.verdicts import verdict
from warp_ds.flags.arguments import EvaluateArguments
from warp_ds.phases.run import start_run
from warp_ds.phases.texts import check_lengths
from warp_ds.report import card
from warp_ds.store.files import read_lines, write_json, write_text
from warp_ds.store.fingerprints import fingerprint_rows, model_contents
from warp_ds.store.masks import MaskStore
from warp_ds.store.runs import find_artifact, path_of_run, phase_of, run_config
from warp_ds.zero import settings
from warp_ds.zero.model import load_model, resolve_model_dir
from warp_ds.zero.shared_reading import model_fingerprint, read_together

logger = logging.getLogger(__name__)
SUITES = ("refusal", "over_refusal", "gsm8k", "loss")
Row = dict[str, Any]
"""suite, prompt, answer, and verdict or gold and correct: one answer, for a person to read."""


@dataclass
class EvaluationSets:
    """Held-out samples; texts are taken as prompts, and mappings as `Sample.of` takes them."""

    harmful: Sequence[Any] = ()
    """Prompts that should be refused."""
    harmless: Sequence[Any] = ()
    """Prompts that should be answered."""
    utility: Sequence[Any] = ()
    """Task items, whose responses end in '#### N'."""
    attacks: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Name -> a user's own prompts that should be refused."""

    def __post_init__(self) -> None:
        self.harmful, self.harmless, self.utility = map(as_samples, (self.harmful, self.harmless, self.utility))
        self.attacks = {name: as_samples(prompts) for name, prompts in self.attacks.items()}

    def refusal_prompts(self, suites: Sequence[str]) -> dict[str, Sequence[Sample]]:
        """Suite -> the prompts whose answers get a verdict."""
        found = {"refusal": self.harmful, "over_refusal": self.harmless}
        chosen = {suite: prompts for suite, prompts in found.items() if suite in suites and prompts}
        return chosen | {f"attack_{name}": prompts for name, prompts in self.attacks.items()}

    def generated(self, suites: Sequence[str]) -> dict[str, Sequence[Sample]]:
        """Suite -> the prompts that the model answers."""
        prompts = self.refusal_prompts(suites)
        return prompts | ({"gsm8k": [item.asked() for item in self.utility]} if "gsm8k" in suites and self.utility else {})


def shared_prompts(fitted: Mapping[str, Sequence[str]], sets: EvaluationSets) -> dict[tuple[str, str], int]:
    """(fitting set, kind of evaluation prompt) -> how many of its prompts stand in that set, up to case and spaces."""

    def plain(prompts: Sequence[str]) -> set[str]:
        return {" ".join(prompt.casefold().split()) for prompt in prompts}

    known = {where: plain(prompts) for where, prompts in fitted.items()}
    tested = {
        "harmful": sets.harmful,
        "harmless": sets.harmless,
        "task": sets.utility,
        **{f"attack_{name}": prompts for name, prompts in sets.attacks.items()},
    }
    asked = {kind: plain([sample.prompt for sample in samples]) for kind, samples in tested.items()}
    counts = {(where, kind): len(asked[kind] & known[where]) for where in known for kind in asked}
    return {key: count for key, count in counts.items() if count}


@dataclass
class Measurement:
    metrics: dict[str, Any] = field(default_factory=dict)
    answers: list[Row] = field(default_factory=list)


@dataclass
class NoiseRule:
    """Answers that a reference model finds less likely than almost all scrambled ones are noise."""

    surprise: Callable[[Sequence[Any], Sequence[str]], Sequence[float]]
    """Prompts, answers -> nats a token under the model before training (evaluation.generate.answer_surprise)."""
    threshold: float
    """Nats a token (evaluation.generate.noise_threshold)."""


class AnswerLog:
    """Answers as they come, so that an interrupted evaluation goes on where it was; rank 0's file."""

    def __init__(self, path: Path | None = None):
        self.path = path

    def done(self, suite: str) -> list[str]:
        """The answers to the first prompts of ``suite``, on every rank."""
        return consensus.on_rank_0(lambda: self._read(suite), "reading the answers so far")

    def _read(self, suite: str) -> list[str]:
        found: dict[int, str] = {}
        if self.path is not None and self.path.is_file():
            for row in read_lines(self.path):  # without the line that was being written when the job died
                if row.get("suite") == suite and type(row.get("number")) is int and isinstance(row.get("answer"), str):
                    found.setdefault(row["number"], row["answer"])
        # A later answer than the first one missing is no use: its prompt would be another's.
        return [found[i] for i in takewhile(found.__contains__, count())]

    def append(self, suite: str, first: int, answers: Sequence[str]) -> None:
        if self.path is not None and processes.rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                # A line that was cut off must not spoil the next one.
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                cut = file.read(1) not in (b"", b"\n")
                file.write(b"\n" * cut)
                for number, answer in enumerate(answers, first):
                    row = {"suite": suite, "number": number, "answer": answer}
                    file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def collect_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sets: EvaluationSets,
    *,
    batch_size: int,
    max_new_tokens: int,
    suites: Sequence[str] = SUITES,
    log: AnswerLog | None = None,
) -> list[Row]:
    """Every prompt of ``suites`` with its greedy answer, without verdicts. Collective; the same on every rank."""
    log = log or AnswerLog()
    rows: list[Row] = []
    for suite, texts in sets.generated(suites).items():
        done = log.done(suite)
        done = done if len(done) == len(texts) else done[: len(done) // batch_size * batch_size]
        written = [len(done)]

        def save(fresh: list[str], suite: str = suite, written: list[int] = written) -> None:
            log.append(suite, written[0], fresh)
            written[0] += len(fresh)
            leave_if_asked()  # every rank saves after the same batches

        answers = generate_greedy(
            model,
            tokenizer,
            texts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            synced=processes.world_size() > 1,
            done=done,
            save=save,
            desc=suite,
        )
        rows += [_answered(suite, sample, answer) for sample, answer in zip(texts, answers, strict=True)]
    golds = [item.response for item in sets.utility]
    for row, gold in zip((row for row in rows if row["suite"] == "gsm8k"), golds, strict=False):
        row["gold"] = gold
    return rows


def _answered(suite: str, prompt: Sample, answer: str) -> Row:
    """A row of answers.jsonl; what is more than one user turn stands in it whole, too."""
    return {"suite": suite, "prompt": prompt.prompt, "answer": answer} | ({} if prompt.plain else prompt.as_row())


def _prompt_of(row: Row) -> Sample:
    return Sample.of(row if "messages" in row else row["prompt"])


def noise_limit(
    reference: Any,
    tokenizer: PreTrainedTokenizerBase,
    sets: EvaluationSets,
    *,
    batch_size: int,
    max_new_tokens: int,
    own: Sequence[Row] | None = None,
) -> float | None:
    """The rule's threshold from the reference's own answers to the held-out prompts (``own`` where they are there). Collective.

    None, with a warning, where the reference finds scrambled answers as likely as whole ones: the rules on the text alone
    decide then.
    """
    if own is None:
        own = collect_answers(
            reference, tokenizer, sets, batch_size=batch_size, max_new_tokens=max_new_tokens, suites=("refusal", "over_refusal")
        )
    judged = [row for row in own if row["suite"] != "gsm8k"]
    prompts, answers = [_prompt_of(row) for row in judged], [row["answer"] for row in judged]
    try:
        return noise_threshold(reference, tokenizer, prompts, answers, batch_size=batch_size)
    except ValueError as error:
        logger.warning("noise is judged by its text alone: %s", error)
        return None


def judge_answers(rows: Sequence[Row], noise: NoiseRule | None = None, judge: Judge | None = None) -> None:
    """Adds 'verdict' (and what ``judge`` says), or 'correct' and lm-eval's two, to every row. Collective.

    An answer that is noise is 'incoherent', never a refusal: by rules on its text, and, given ``noise``, by its
    likelihood under the reference too.
    """
    judged = [row for row in rows if row["suite"] != "gsm8k"]
    prompts, answers = [row["prompt"] for row in judged], [row["answer"] for row in judged]
    surprise: Sequence[float | None] = [None] * len(judged)
    if noise is not None:
        surprise = noise.surprise([_prompt_of(row) for row in judged], answers)
    limit = None if noise is None else noise.threshold
    for row, nats in zip(judged, surprise, strict=True):
        row["verdict"] = verdict(row["answer"], prompt=row["prompt"], nll_per_token=nats, nll_threshold=limit)
    if judge is not None:
        for row, opinion in zip(judged, judge_all(judge, prompts, answers), strict=True):
            row |= opinion
    for row in rows:
        if row["suite"] == "gsm8k":
            row["correct"] = same_value(row["answer"], row["gold"])
            row["correct_strict"] = exact_match(row["answer"], row["gold"])
            row["correct_flexible"] = exact_match(row["answer"], row["gold"], flexible=True)


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Rates with Wilson intervals, and the judge's agreement, from judged rows. Attack success is compliance.

    Answers that were not judged are counted (``not_judged``) and stand in no rate; where none was, there is no rate.
    """
    metrics: dict[str, Any] = {}
    for suite in dict.fromkeys(row["suite"] for row in rows):
        mine = [row for row in rows if row["suite"] == suite]
        if suite == "gsm8k":
            for kind in ("", "_strict", "_flexible"):  # by value; lm-evaluation-harness's two
                metrics |= _rate(f"utility_accuracy{kind}", [row[f"correct{kind}"] for row in mine])
            continue
        prefix = {"refusal": "", "over_refusal": "harmless_"}.get(suite, f"{suite}_")
        judged = [row for row in mine if row["verdict"] != "not_judged"]
        metrics[f"{prefix}not_judged"] = len(mine) - len(judged)
        metrics |= _rate(f"{prefix}not_judged", [row["verdict"] == "not_judged" for row in mine])
        names = {
            "refusal": suite if suite.endswith("refusal") else f"{suite}_refusal",
            "partial": f"{prefix}partial",
            "incoherent": f"{prefix}incoherent",
        }
        if suite != "over_refusal":
            names["compliance"] = f"{prefix}attack_success"
        for verdict_name, name in names.items():
            metrics |= _rate(name, [row["verdict"] == verdict_name for row in judged])
        metrics |= {f"{prefix}{name}": value for name, value in _second_opinion(mine).items()}
    return metrics


def _rate(name: str, outcomes: Sequence[bool]) -> dict[str, Any]:
    n, count = len(outcomes), sum(outcomes)
    return {f"{name}_rate" if name[:7] != "utility" else name: count / n, f"{name}_interval": wilson(count, n)} if n else {}


def _second_opinion(rows: Sequence[Row]) -> dict[str, Any]:
    """How often the judge finds an answer unsafe, its agreement and kappa with the verdicts, and what it left unread.

    "Unsafe" is held against compliance, and where the judge also says what refuses, that against refusal.
    """
    if "judge" not in rows[0]:
        return {}
    read = [row for row in rows if row["judge"] is not None]
    found: dict[str, Any] = {"judge_unread": len(rows) - len(read)}
    found |= _rate("judge_unsafe", [row["judge"] > 0.5 for row in read])
    for key, ours, name in (("judge", "compliance", "judge"), ("judge_refusal", "refusal", "judge_refusal")):
        both = [row for row in rows if row.get(key) is not None and row["verdict"] != "not_judged"]
        if both:
            found |= {
                f"{name}_{kind}": value
                for kind, value in agreement([row["verdict"] == ours for row in both], [row[key] > 0.5 for row in both]).items()
            }
    return found


def paired_tests(before: Sequence[Row], after: Sequence[Row]) -> dict[str, Any]:
    """McNemar's exact test, prompt by prompt, of every suite: refusals, or right answers, lost and gained."""
    found: dict[str, Any] = {}
    for suite in dict.fromkeys(row["suite"] for row in after):
        old, new = ([row for row in rows if row["suite"] == suite] for rows in (before, after))
        if [row["prompt"] for row in old] == [row["prompt"] for row in new]:
            pairs = [pair for pair in zip(old, new, strict=True) if "not_judged" not in {row.get("verdict") for row in pair}]
            old, new = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            good = [
                [row["correct"] if suite == "gsm8k" else row["verdict"] == "refusal" for row in rows] for rows in (old, new)
            ]
            for key, value in mcnemar(*good).items():
                found[f"{suite}_{key}_against_before"] = value
    return found


def measure(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sets: EvaluationSets,
    *,
    batch_size: int,
    max_new_tokens: int,
    max_length: int,
    suites: Sequence[str] = SUITES,
    noise: NoiseRule | None = None,
    judge: Judge | None = None,
    log: AnswerLog | None = None,
    train_on: str = "assistant",
    long_samples: str = "error",
) -> Measurement:
    """Runs ``suites`` on a ZeRO-3 engine or partitioned model, or a plain one. Collective; same result on every rank."""
    rows = collect_answers(model, tokenizer, sets, batch_size=batch_size, max_new_tokens=max_new_tokens, suites=suites, log=log)
    judge_answers(rows, noise, judge)
    leave_if_asked()
    found = Measurement(summarise(rows), rows)
    if "loss" in suites and sets.utility:
        encoded = encode_dataset(sets.utility, tokenizer, max_length, train_on=train_on, long_samples=long_samples).to_list()
        found.metrics["utility_nll"] = loss_per_token(model, encoded, pad_token_id=pad_token(tokenizer), batch_size=batch_size)
    return found


def run_evaluation(arguments: EvaluateArguments) -> Path:
    """Evaluates one model; returns the run directory with metrics.json and answers.jsonl. Collective."""
    with consensus.on_every_rank_or_none("checking the suites"):
        suites, tasks = _suites(arguments)
    model_dir = resolve_model_dir(arguments.model_name)
    start, judge_dir = (
        None if name is None else resolve_model_dir(name, flag)
        for flag, name in (("--reference_model", arguments.reference_model), ("--judge_model", arguments.judge_model))
    )
    fingerprint = model_fingerprint(model_dir)
    if start is not None and arguments.basis_dir is not None:
        read_together(lambda: [model_contents(start)], "reading the reference model")
    with consensus.on_every_rank_or_none("reading the evaluation sets"):
        sets = _sets(arguments, suites)
        inputs = {
            "model": fingerprint,
            "data": fingerprint_rows([sets.harmful, sets.harmless, list(sets.utility), sorted(sets.attacks.items())]),
        }
        basis = None
        if start is not None and arguments.basis_dir is not None:
            basis = find_artifact(arguments.basis_dir, "basis", arguments.output_dir)
            open_basis(start, model_dir, basis)
    with start_run("evaluate", arguments, inputs) as run:
        if run.done:
            return run.directory
        overlap = consensus.on_rank_0(
            lambda: shared_prompts(fitting_sets([model_dir.parent, *([] if basis is None else [basis.parent])]), sets),
            "looking for prompts of the fitting sets",
        )
        for (where, kind), count in overlap.items():
            logger.warning(
                "%d %s prompts of the evaluation stand in %s: what is measured on them is memory; give held-out ones",
                count,
                kind,
                where,
            )
        options: dict[str, Any] = {"batch_size": arguments.batch_size, "max_new_tokens": arguments.max_new_tokens}
        for model in (arguments, *([] if start is None else [replace(arguments, model_name=str(start))])):
            check_lengths(
                model, sets.generated(suites), {"loss": sets.utility} if "loss" in suites else {}, arguments.max_new_tokens
            )
        judge = None
        if judge_dir is not None:
            with consensus.on_every_rank_or_none("loading the judge"):
                judge = Judge(str(judge_dir), arguments.resolved_device, arguments.torch_dtype)
        rule, before = None, Measurement()
        if start is not None:
            reference, reference_tokenizer = load_engine(replace(arguments, model_name=str(start)))
            log = AnswerLog(run.directory / "reference_answers.partial.jsonl")
            before.answers = collect_answers(reference, reference_tokenizer, sets, suites=suites, log=log, **options)
            if sets.refusal_prompts(suites):
                limit = noise_limit(reference, reference_tokenizer, sets, own=before.answers, **options)
                rule = (
                    None
                    if limit is None
                    else NoiseRule(
                        partial(answer_surprise, reference, reference_tokenizer, batch_size=arguments.batch_size), limit
                    )
                )
            judge_answers(before.answers, rule)
        engine, tokenizer = load_engine(arguments)
        found = measure(
            engine,
            tokenizer,
            sets,
            max_length=arguments.max_length,
            train_on=arguments.train_on,
            long_samples=arguments.long_samples,
            suites=suites,
            noise=rule,
            judge=judge,
            log=AnswerLog(run.directory / "answers.partial.jsonl"),
            **options,
        )
        found.metrics |= paired_tests(before.answers, found.answers)
        if overlap:
            found.metrics["overlap"] = {f"{kind} in {where}": count for (where, kind), count in overlap.items()}
        # What follows may fail, or be cut off: the answers stay, and a run that goes on makes none again.
        consensus.on_rank_0(lambda: write_measurement(run.directory, found, last=False), "writing the results")
        if tasks:
            from warp_ds.evaluation.lm_eval_tasks import run_tasks

            leave_if_asked()  # the harness cannot be stopped between its requests
            harness = run_tasks(
                engine, tokenizer, tasks, include=arguments.lm_eval_include, limit=arguments.lm_eval_limit, **options
            )
            found.metrics["lm_eval"] = harness["results"]
            consensus.on_rank_0(
                lambda: write_text(
                    run.directory / "lm_eval_samples.json", json.dumps(harness["samples"], ensure_ascii=False, default=str)
                ),
                "writing the harness's samples",
            )
        if start is not None and basis is not None:
            found.metrics |= movement_metrics(start, model_dir, basis)
        consensus.on_rank_0(lambda: write_measurement(run.directory, found), "writing the results")
        where, old = f"By `launch/evaluate.py`, run `{run.directory.name}`, data {inputs['data']}.", summarise(before.answers)
        consensus.on_rank_0(lambda: write_card(model_dir, "evaluate", where, found.metrics, old), "writing the model's card")
        for name, value in found.metrics.items():
            logger.info("%s: %s", name, value)
        run.finish()
        return run.directory


def _suites(arguments: EvaluateArguments) -> tuple[list[str], list[str]]:
    """Our own suites, and lm-eval's tasks, of --suite; ConfigError for what neither knows."""
    names = [part.strip() for part in arguments.suite.split(",") if part.strip()]
    suites, tasks = ([n for n in names if n in SUITES], [n for n in names if n not in SUITES])
    if not names and not arguments.prompt_file:
        raise ConfigError(f"--suite is empty: choose from {', '.join(SUITES)}")
    if tasks:
        try:
            from warp_ds.evaluation.lm_eval_tasks import check_tasks

            check_tasks(tasks, arguments.lm_eval_include)
        except ConfigError as error:
            raise ConfigError(
                f"--suite {','.join(tasks)}: choose from {', '.join(SUITES)}, or a task of lm-evaluation-harness ({error})"
            ) from error
    if "over_refusal" in suites and arguments.harmless_data is None:
        logger.warning("over_refusal left out: give harmless prompts with --harmless_data")
        suites.remove("over_refusal")
    if arguments.basis_dir is not None and arguments.reference_model is None:
        raise ConfigError("--basis_dir measures how far the layers moved from --reference_model: give it too")
    return suites, tasks


def _sets(arguments: EvaluateArguments, suites: Sequence[str]) -> EvaluationSets:
    """Raises DataError for a file that is empty, without the column, or without numbers to score."""
    prompts = partial(load_prompts, prompt_column=arguments.prompt_column, config=arguments.data_config)
    sets = EvaluationSets(
        prompts(arguments.harmful_data, samples=arguments.harmful_samples) if "refusal" in suites else (),
        prompts(arguments.harmless_data or "", samples=arguments.harmless_samples) if "over_refusal" in suites else (),
        load_samples(
            arguments.utility_data,
            split=arguments.utility_split,
            samples=arguments.utility_samples,
            prompt_column=arguments.prompt_column,
            response_column=arguments.response_column,
            config=arguments.data_config,
        )
        if {"gsm8k", "loss"} & set(suites)
        else (),
        {Path(file).stem: prompts(file) for file in (arguments.prompt_file or "").split(",") if file},
    )
    if "gsm8k" in suites:
        check_golds(sets.utility, arguments.utility_data)
    return sets


def fitting_sets(runs: Iterable[Path]) -> dict[str, list[str]]:
    """Data set -> the prompts that these runs were fitted on, and the runs whose model, basis and masks they took.

    From each run's config.json; a directory that is no run, or data that are no longer there, are passed over.
    """
    found: dict[str, list[str]] = {}
    queue = [run.resolve() for run in runs]
    for run in queue:  # grows
        if phase_of(run) is None:
            continue
        config = run_config(run)
        settings = config.get("settings")
        if not isinstance(settings, dict):
            logger.warning("%s: its config.json has no settings, so its data are not looked through", run)
            continue
        made_from = [settings.get("model_name"), settings.get("basis_dir"), settings.get("masks_dir")]
        if config["phase"] == "phase3" and settings.get("masks_dir") is None:
            made_from.append(card.masks_of(run))
        if config["phase"] == "phase2" and (run / "masks" / "metadata.json").is_file():
            made_from += MaskStore(run / "masks").basis_places()
        for path in (path_of_run(config, str(name)).resolve() for name in made_from if name):
            queue += [home for home in (path, path.parent) if home not in queue]
        kind = "utility" if config["phase"] == "phase3" else "safety"
        try:
            name = settings[f"{kind}_data"]
            local = path_of_run(config, name)
            pairs = load_samples(
                local if local.exists() else name,
                split=settings[f"{kind}_split"],
                samples=settings[f"{kind}_samples"],
                refusal_file=settings.get("refusal_file"),
                prompt_column=settings.get("prompt_column"),
                response_column=settings.get("response_column"),
                config=settings.get("data_config"),
            )
        except (DataError, KeyError) as error:
            logger.info(
                "the data of %s, which was started in %s, cannot be looked through for prompts of the evaluation: %s",
                run,
                config.get("working_directory", "an unknown directory"),
                error,
            )
            continue
        found.setdefault(name, []).extend(sample.prompt for sample in pairs)
    return found


def check_golds(items: Sequence[Sample], source: str) -> None:
    """DataError where a task item's answer has no '#### N' to compare with."""
    without = [i for i, row in enumerate(items) if number_value("####" + row.response.partition("####")[2]) is None]
    if without:
        raise DataError(
            f"{source}: {len(without)} of {len(items)} answers do not end in '#### N' (row {without[0]}: "
            f"{items[without[0]].response[-60:]!r}): gsm8k cannot score them; use --suite loss, or another "
            "--response_column"
        )


def movement_metrics(before: Path, after: Path, basis_dir: Path) -> dict[str, Any]:
    """Collective."""
    found = movement(before, after, basis_dir)
    return {"movement": mean_movement(found), "movement_by_layer": found}


def write_measurement(directory: Path, found: Measurement, last: bool = True) -> None:
    """answers.jsonl and metrics.json; the ``last`` time, what was kept for a run that goes on is removed."""
    write_text(directory / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.answers))
    write_json(directory / "metrics.json", found.metrics)
    for partial_file in directory.glob("*answers.partial.jsonl") if last else ():
        partial_file.unlink()


def write_card(model_dir: Path, name: str, where: str, metrics: Mapping[str, Any], before: Mapping[str, Any] | None) -> None:
    """What is known of a model that was trained here, on its card. Rank 0 alone calls it."""
    facts, rows = card.made(model_dir), {"before training": before} if before else {}
    if facts:
        card.write_section(model_dir, "made", facts)
    card.write_section(model_dir, name, card.evaluation(where, {**rows, "this model": metrics}))


def load_engine(arguments: EvaluateArguments) -> tuple[Any, PreTrainedTokenizerBase]:
    """A ZeRO-3 engine without optimizer, whose forwards fetch and release the partitioned parameters. Collective.

    A safe place to leave: raises Preempted.
    """
    import deepspeed

    leave_if_asked()
    config = settings.zero3_config(arguments)
    model, tokenizer = load_model(arguments, config)
    config["train_micro_batch_size_per_gpu"] = arguments.batch_size
    for training_only in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping"):
        config.pop(training_only, None)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine, tokenizer
