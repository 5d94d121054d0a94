"""A second process on a study: it opens the same problem, takes trials that wait, and leaves their scores for the driver to tell."""

from __future__ import annotations

import time
from pathlib import Path

from bmm_engine.errors import BmmError, ConfigError, SearchError
from bmm_engine.executors import WorkerInfo, open_executor
from bmm_engine.executors.devices import check_device
from bmm_engine.pipeline.models import open_models
from bmm_engine.progress import Report
from bmm_engine.recipe.recipe import Recipe
from bmm_engine.searching.identity import identity_of
from bmm_engine.searching.run import study_folder
from bmm_engine.searching.session import prepare
from bmm_engine.searching.study import Study
from bmm_engine.searching.workers import RecipeProblem, open_runner, run_trial, with_grams, with_search_weights

POLL_S = 0.2


def join_search(
    recipe: Recipe, output: Path, *, local_files_only: bool = False, report: Report = lambda line: None
) -> int:
    """Work for the search that another process drives on the same recipe and output, until it ends; the number of trials run here.

    Raises `SearchError` if no process drives the study, `ConfigError` if it is a study of another recipe.
    """
    check_device(recipe.device)
    if recipe.search.schedule == "synchronous":
        raise ConfigError(
            "a synchronous search takes no joined workers: its batches are as large as its own workers are many."
        )
    folder = study_folder(output.resolve())
    models = open_models(recipe, local_files_only)
    recipe = with_search_weights(recipe, models, report)
    with Study.open(folder) as study, open_executor(0) as executor:
        study.check_identity(identity_of(recipe, models, 1))
        if not study.driver_alive():
            raise SearchError(
                f"{folder}: no process drives this study, so there is nothing to join. Start the same command without --join."
            )
        measured = with_grams(recipe, folder, executor, local_files_only, report)
        opener = RecipeProblem(measured, local_files_only, models)
        problem = opener()
        prepared = prepare(problem, opener, executor)
        runner = open_runner(
            WorkerInfo(0, 1), lambda: problem, prepared.groups, prepared.shared, "validation", recipe.device
        )
        done = 0
        with study.join() as worker:
            report(f"joined {folder} as worker {worker.name}")
            while study.driver_alive():
                trial = study.claim(worker)
                if trial is None:
                    time.sleep(POLL_S)
                    continue
                try:
                    outcome = run_trial(runner, trial.parameters, None)
                except BmmError as error:
                    study.failed(trial.number, str(error), worker.name)
                    continue
                study.evaluated(trial.number, outcome.scores, outcome.seconds, outcome.evaluation_seconds, worker.name)
                done += 1
                report(f"trial {trial.number}: {outcome.seconds:.1f} s")
        return done
