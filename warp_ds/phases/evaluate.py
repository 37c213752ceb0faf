"""Evaluation: refusals, over-refusals, exact match and loss, under ZeRO-3 on any number of ranks, same results."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from warp_ds.cluster import consensus, processes
from warp_ds.cluster.preemption import leave_if_asked
from warp_ds.data.datasets import load_prompts, load_samples
from warp_ds.errors import ConfigError
from warp_ds.evaluation.answers import AnswerLog, Row, collect_answers
from warp_ds.evaluation.generate import answer_surprise
from warp_ds.evaluation.judge import Judge
from warp_ds.evaluation.measure import Measurement, NoiseRule, judge_answers, measure, noise_limit, paired_tests, summarise
from warp_ds.evaluation.movement import mean_movement, movement, open_basis
from warp_ds.evaluation.sets import SUITES, EvaluationSets, check_golds, shared_prompts
from warp_ds.flags.arguments import EvaluateArguments
from warp_ds.phases.behaviours import held_out
from warp_ds.phases.fitting import fitting_sets
from warp_ds.phases.publish import fetch_shared
from warp_ds.phases.run import start_run
from warp_ds.phases.texts import check_lengths, task_options
from warp_ds.report import card
from warp_ds.report.tables import evaluation_blocks, to_terminal
from warp_ds.store.files import write_json, write_text
from warp_ds.store.fingerprints import fingerprint_rows, model_contents
from warp_ds.store.runs import find_artifact
from warp_ds.zero import settings
from warp_ds.zero.model import load_model, resolve_model_dir
from warp_ds.zero.shared_reading import model_fingerprint, read_together

logger = logging.getLogger(__name__)


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
    fetch_shared(arguments)
    if start is not None and arguments.basis_dir is not None:
        read_together(lambda: [model_contents(start)], "reading the reference model")
    with consensus.on_every_rank_or_none("reading the evaluation sets"):
        sets = _sets(arguments, suites)
        inputs = {"model": fingerprint, "data": _fingerprint(sets)}
        basis = None
        if start is not None and arguments.basis_dir is not None:
            basis = find_artifact(arguments.basis_dir, "basis", arguments.output_dir)
            open_basis(start, model_dir, basis)
    with start_run("evaluate", arguments, inputs) as run:
        if run.done:
            return run.directory
        fitted_by = [model_dir.parent, *([] if basis is None else [basis.parent])]
        overlap = consensus.on_rank_0(lambda: _overlap(fitted_by, sets), "looking for prompts of the fitting sets")
        for model in (arguments, *([] if start is None else [replace(arguments, model_name=str(start))])):
            _check_lengths(model, sets, suites)
        judge = None if judge_dir is None else _load_judge(judge_dir, arguments)
        rule, before = (None, []) if start is None else _reference(start, arguments, sets, suites, run.directory)
        engine, tokenizer = load_engine(arguments)
        log = AnswerLog(run.directory / "answers.partial.jsonl")
        sizes = _sizes(arguments) | {name: getattr(arguments, name) for name in ("max_length", "train_on", "long_samples")}
        measured = measure(engine, tokenizer, sets, **sizes, suites=suites, noise=rule, judge=judge, log=log)
        measured.metrics |= paired_tests(before, measured.answers) | ({"overlap": overlap} if overlap else {})
        # What follows may fail, or be cut off: the answers stay, and a run that goes on makes none again.
        consensus.on_rank_0(lambda: write_measurement(run.directory, measured, last=False), "writing the results")
        measured.metrics |= {"lm_eval": _run_tasks(engine, tokenizer, tasks, arguments, run.directory)} if tasks else {}
        if start is not None and basis is not None:
            measured.metrics |= movement_metrics(start, model_dir, basis)
        consensus.on_rank_0(lambda: write_measurement(run.directory, measured), "writing the results")
        where = f"By `launch/evaluate.py`, run {card.code(run.directory.name)}, data {inputs['data']}."
        rows = {**({"before training": summarise(before)} if before else {}), "this model": measured.metrics}
        _write_card(model_dir, arguments, where, rows)
        run.finish()
        if processes.rank() == 0:
            to_terminal([*evaluation_blocks(rows), f"All numbers: {run.directory / 'metrics.json'}"])
        return run.directory


def _sizes(arguments: EvaluateArguments) -> dict[str, Any]:
    return {"batch_size": arguments.batch_size, "max_new_tokens": arguments.max_new_tokens}


def _check_lengths(arguments: EvaluateArguments, sets: EvaluationSets, suites: Sequence[str]) -> None:
    """DataError for texts that are too long for the model. Collective."""
    losses = {"loss": sets.utility} if "loss" in suites else {}
    check_lengths(arguments, sets.generated(suites), losses, arguments.max_new_tokens)


def _write_card(model_dir: Path, arguments: EvaluateArguments, where: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    metrics, before = rows["this model"], rows.get("before training")
    data = {"harmful": arguments.harmful_data, "harmless": arguments.harmless_data, "task": arguments.utility_data}
    consensus.on_rank_0(lambda: write_card(model_dir, "evaluate", where, metrics, before, data), "writing the model's card")


def _overlap(runs: Sequence[Path], sets: EvaluationSets) -> dict[str, int]:
    """'harmful in safety.jsonl' -> how many prompts of the evaluation stand there, with a warning; of what ``runs`` were
    fitted on. Rank 0 alone calls it."""
    shared = shared_prompts(fitting_sets(runs), sets)
    for (where, kind), count in shared.items():
        logger.warning(
            "%d %s prompts of the evaluation stand in %s: what is measured on them is memory; give held-out ones",
            count,
            kind,
            where,
        )
    return {f"{kind} in {where}": count for (where, kind), count in shared.items()}


def _load_judge(model_dir: Path, arguments: EvaluateArguments) -> Judge:
    with consensus.on_every_rank_or_none("loading the judge"):
        return Judge(str(model_dir), arguments.resolved_device, arguments.torch_dtype)


def _reference(
    start: Path, arguments: EvaluateArguments, sets: EvaluationSets, suites: Sequence[str], directory: Path
) -> tuple[NoiseRule | None, list[Row]]:
    """The rule for noise, and the judged answers, of the model before training. Collective."""
    model, tokenizer = load_engine(replace(arguments, model_name=str(start)))
    log = AnswerLog(directory / "reference_answers.partial.jsonl")
    sizes = _sizes(arguments)
    answers = collect_answers(model, tokenizer, sets, suites=suites, log=log, **sizes)
    limit = noise_limit(model, tokenizer, sets, own=answers, **sizes) if sets.refusal_prompts(suites) else None
    surprise = partial(answer_surprise, model, tokenizer, batch_size=arguments.batch_size)
    rule = None if limit is None else NoiseRule(surprise, limit)
    judge_answers(answers, rule, formats=sets.formats)
    return rule, answers


def _run_tasks(
    engine: Any, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], arguments: EvaluateArguments, directory: Path
) -> dict[str, Any]:
    """The results of lm-evaluation-harness's ``tasks``; its samples go to lm_eval_samples.json. Collective."""
    from warp_ds.evaluation.lm_eval_tasks import run_tasks

    leave_if_asked()  # the harness cannot be stopped between its requests
    include, limit = arguments.lm_eval_include, arguments.lm_eval_limit
    harness = run_tasks(engine, tokenizer, tasks, include=include, limit=limit, **_sizes(arguments))
    samples = json.dumps(harness["samples"], ensure_ascii=False, default=str)
    consensus.on_rank_0(lambda: write_text(directory / "lm_eval_samples.json", samples), "writing the harness's samples")
    return harness["results"]


def _suites(arguments: EvaluateArguments) -> tuple[list[str], list[str]]:
    """Our own suites, and lm-eval's tasks, of --suite; ConfigError for what neither knows."""
    names = [part.strip() for part in arguments.suite.split(",") if part.strip()]
    suites, tasks = ([n for n in names if n in SUITES], [n for n in names if n not in SUITES])
    if not names and not arguments.prompt_file and not arguments.kept_data:
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
    prompts = partial(load_prompts, prompt_column=arguments.prompt_column, streaming=arguments.streaming)
    sets = EvaluationSets(
        prompts(arguments.harmful_data, samples=arguments.harmful_samples) if "refusal" in suites else (),
        prompts(arguments.harmless_data or "", samples=arguments.harmless_samples) if "over_refusal" in suites else (),
        load_samples(arguments.utility_data, **task_options(arguments)) if {"gsm8k", "loss"} & set(suites) else (),
        {Path(file).stem: prompts(file) for file in (arguments.prompt_file or "").split(",") if file},
        *held_out(arguments),
    )
    if "gsm8k" in suites:
        check_golds(sets.utility, arguments.utility_data)
    return sets


def _fingerprint(sets: EvaluationSets) -> str:
    """Over all of them; of behaviours only where there are any, so that it is what it was before there could be."""
    kept = [sorted(sets.kept.items()), sorted(sets.formats.items())] if sets.kept else []
    return fingerprint_rows([sets.harmful, sets.harmless, list(sets.utility), sorted(sets.attacks.items()), *kept])


def movement_metrics(before: Path, after: Path, basis_dir: Path) -> dict[str, Any]:
    """Collective."""
    by_layer = movement(before, after, basis_dir)
    return {"movement": mean_movement(by_layer), "movement_by_layer": by_layer}


def write_measurement(directory: Path, measured: Measurement, last: bool = True) -> None:
    """answers.jsonl and metrics.json; the ``last`` time, what was kept for a run that goes on is removed."""
    write_text(directory / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in measured.answers))
    write_json(directory / "metrics.json", measured.metrics)
    for partial_file in directory.glob("*answers.partial.jsonl") if last else ():
        partial_file.unlink()


def write_card(
    model_dir: Path,
    name: str,
    where: str,
    metrics: Mapping[str, Any],
    before: Mapping[str, Any] | None,
    data: Mapping[str, str | None],
) -> None:
    """What is known of a model that was trained here, on its card. Rank 0 alone calls it.

    ``data``: 'harmful', 'harmless' and 'task' -> where the prompts come from.
    """
    facts, rows = card.made(model_dir), {"before training": before} if before else {}
    if facts:
        card.write_section(model_dir, "made", facts)
    results = card.eval_results(metrics, {kind: source for kind, source in data.items() if source})
    card.write_section(model_dir, name, card.evaluation(where, {**rows, "this model": metrics}), results)


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
