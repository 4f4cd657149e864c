"""The schedule and the sensors that launch iterations; `next_cell` decides which one is next."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import dagster as dg
from dagster._core.storage.tags import PARTITION_NAME_TAG

from resources.freshness import Freshness
from resources.store import ArtifactError, ArtifactStore
from textalign_dagster.experiment.files import Library, store_url
from textalign_dagster.loop.abandoned import BATCHES_TAG, RETRY_TAG, active_runs, release_abandoned
from textalign_dagster.loop.partitions import EXPERIMENTS, Cell
from textalign_dagster.settings import SettingsError

iteration_job = dg.define_asset_job(
    "iteration",
    dg.AssetSelection.groups("loop").materializable(),
    description="One iteration of one experiment, all stages. Several iterations: select several "
    "partitions; the run queue takes them in order, one at a time per experiment.",
)


BATCHES = "ledger/batches"
"""Where Batch API jobs are kept in the store (resources/judges/batch_jobs.py)."""


class Next(NamedTuple):
    """The cell to run next, or why there is none."""

    cell: Cell | None
    reason: str


def next_cell(store: ArtifactStore, experiment: str) -> Next:
    """The first missing iteration of an experiment.

    There is none when all are done, or when an existing one is stale or blocked by a failed check:
    continuing would mix old and new outputs, or train on data that failed a check, so a person decides.
    """
    try:
        settings = Library.default().load(experiment)
        freshness = Freshness(store, experiment, settings)
        for k in range(1, settings.iterations + 1):
            state = freshness.iteration(k)
            if state.kind == "missing":
                return Next(Cell(experiment, k), state.reason)
            if state.kind != "fresh":
                return Next(None, f"{experiment} halts at iteration {k}: {state.reason}")
    except (SettingsError, ArtifactError) as error:
        return Next(None, f"{experiment} cannot run: {error}")
    return Next(None, f"{experiment} is done: {settings.iterations} iterations")


def ready(instance: dg.DagsterInstance, store: ArtifactStore, experiment: str) -> Next:
    """:func:`next_cell`, unless the experiment is running or the last run of that cell failed or was cancelled."""
    release_abandoned(instance, experiment)
    if active_runs(instance, experiment):
        return Next(None, f"{experiment} is running")
    following = next_cell(store, experiment)
    if following.cell is None:
        return following
    last = _last_runs(instance, following.cell)
    if last and BATCHES_TAG in last[0].tags:
        return Next(None, f"{experiment} waits for the Batch API; the sensor collect_batches resumes it")
    went_wrong = {dg.DagsterRunStatus.FAILURE: "failed", dg.DagsterRunStatus.CANCELED: "was cancelled"}
    how = went_wrong.get(last[0].status) if last else None
    if how is None:
        return following
    return Next(
        None,
        f"{experiment} halts: run {last[0].run_id[:8]} of iteration {following.cell.iteration} {how}; "
        "fix the cause, then re-execute it or materialize the iteration again",
    )


def _last_runs(instance: dg.DagsterInstance, cell: Cell) -> Sequence[dg.DagsterRun]:
    return instance.get_runs(dg.RunsFilter(tags={PARTITION_NAME_TAG: str(cell.key)}), limit=1)


def requests(
    instance: dg.DagsterInstance, experiments: Sequence[str]
) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """A run for every experiment that is ready for its next iteration, or the reasons why none is.

    The first iteration is a person's decision: most shipped experiments need a GPU and large models.
    """
    store, waiting, launched = ArtifactStore(store_url()), [], False
    for experiment in experiments:
        following = ready(instance, store, experiment)
        if following.cell is None:
            waiting.append(following.reason)
        elif following.cell.iteration == 1:
            waiting.append(f"{experiment} waits for its first run (iteration 1 is started by hand)")
        else:
            launched = True
            yield dg.RunRequest(partition_key=following.cell.key)
    if not launched:
        yield dg.SkipReason("; ".join(waiting) or "there are no experiments")


@dg.schedule(job=iteration_job, cron_schedule="0 2 * * *")
def next_iteration(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """Every night at two, launches the next iteration of every idle experiment that has been started."""
    yield from requests(context.instance, EXPERIMENTS)


@dg.sensor(job=iteration_job, minimum_interval_seconds=30)
def advance(context: dg.SensorEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """Launches iteration k + 1 of an experiment once iteration k is complete.

    It checks state, not events, so nothing can be missed. The first iteration is started by a person,
    who also decides what to do about a failed one.
    """
    yield from requests(context.instance, EXPERIMENTS)


@dg.sensor(job=iteration_job, minimum_interval_seconds=60)
def collect_batches(context: dg.SensorEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """Fetches replies from the Batch API and resumes the iterations that wait for them.

    A batch lives in the store and at the endpoint, so neither a restart nor a day without this
    sensor loses anything.
    """
    store = ArtifactStore(store_url())
    if not store.storage.entries(BATCHES):
        yield dg.SkipReason("no batch is pending")
        return
    from resources.judges.batch import collect_all  # needs the extra `judges`
    from resources.judges.ledger import Ledger

    with Ledger(store) as ledger:
        jobs, problems = collect_all(ledger)
    pending = {job.name: len(job.asked) for job in jobs if job.state != "collected"}
    launched = False
    for experiment in EXPERIMENTS:
        cell = next_cell(store, experiment).cell
        if cell is None or active_runs(context.instance, experiment):
            continue
        last = _last_runs(context.instance, cell)
        waits_for = last[0].tags.get(BATCHES_TAG, "").split() if last else []
        if waits_for and not pending.keys() & set(waits_for):
            launched = True
            retry = {name: value for name, value in last[0].tags.items() if name == RETRY_TAG}
            yield dg.RunRequest(run_key=last[0].run_id, partition_key=cell.key, tags=retry)
    if not launched:
        summary = f"{len(pending)} batches with {sum(pending.values()):,} calls are pending"
        yield dg.SkipReason("; ".join([summary, *problems]))
