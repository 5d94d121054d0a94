"""The study on disk: what was returned from survives a SIGKILL, and events, scores and identities come back as they were."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmm_engine import locks
from bmm_engine.errors import ConfigError, OutputExistsError, StudyBusyError, StudyError, StudyExistsError
from bmm_engine.evaluators.scores import Score
from bmm_engine.searching import database
from bmm_engine.searching.canonical import digest, dumps, plain
from bmm_engine.searching.run import check_study_folder
from bmm_engine.searching.study import DATABASE, Study

RECORD = {"identity": {"recipe": {"scale": 1.0, "alpha": [0.1, "inf"]}, "seed": 0}, "seed": 3, "tasks": ["b", "a"]}
SCORES = {"b": Score(0.75, 40, 0.6, 0.85, "accuracy", {"loss": 0.5}), "a": Score(0.5, 10, 0.2, 0.8, "macro_f1")}


@pytest.fixture
def study(tmp_path):
    with Study.create(tmp_path / "x.study", RECORD) as made:
        yield made


def run_trial(study, value, parameters=None, scores=SCORES):
    trial = study.add("proposed", parameters or {"v": value}, waiting=False, worker="w")
    assert study.evaluated(trial.number, scores, 2.0, 1.5, "w")
    study.tell(trial.number, value)
    return trial.number


# Trials and events


def test_a_trial_goes_from_ask_to_tell(study):
    parameters = {"anchor": "average", "alpha": {"z": "inf", "a": 0.03}, "task_weights": [1.0, 2.0]}
    waiting = study.add("default", parameters, waiting=True)
    assert (waiting.number, waiting.state, waiting.worker, waiting.ask_event) == (0, "waiting", None, 0)
    assert study.start(0, "w")
    assert not study.start(0, "late"), "it waits no more"
    assert study.evaluated(0, SCORES, 2.0, 1.5, "w")
    stored = study.trial(0)
    assert (stored.state, stored.value, stored.tell_event) == ("evaluated", None, None)
    study.tell(0, 0.625)
    told = study.trial(0)
    assert told.parameters == parameters
    assert list(told.scores.items()) == list(SCORES.items()), "in the order in which tasks were scored"
    assert (told.kind, told.state, told.value, told.worker, told.attempts) == ("default", "finished", 0.625, "w", 0)
    assert (told.seconds, told.evaluation_seconds, told.tell_event, told.error) == (2.0, 1.5, 1, None)
    assert told.started_at <= told.finished_at
    with pytest.raises(StudyError, match=r"trial 0 is finished and cannot be told 'finished'"):
        study.tell(0, 1.0)


def test_one_counter_orders_asks_and_tells(study):
    for _ in range(3):
        study.add("proposed", {}, waiting=False, worker="w")
    for number, state in ((2, "finished"), (0, "pruned")):
        study.evaluated(number, SCORES, 1, 1, "w", pruned_after="b")
        study.tell(number, number / 2, state=state)
    study.add("proposed", {}, waiting=True)
    study.tell(1, None, state="failed", error="no finite logits in \udcff.json")
    found = [(kind, trial.number) for kind, trial in study.events()]
    asks = [("ask", 0), ("ask", 1), ("ask", 2)]
    assert found == [*asks, ("tell", 2), ("tell", 0), ("ask", 3), ("tell", 1)]
    assert [t.number for t in study.trials(["pruned", "failed"])] == [0, 1]
    assert study.trial(0).pruned_after == "b"
    assert study.trial(1).error == "no finite logits in \\udcff.json"


def test_best_is_the_highest_and_of_equals_the_first(study):
    assert study.best() is None
    for value in (0.5, math.inf, -math.inf, math.inf):
        run_trial(study, value, {"v": str(value)})
    study.evaluated(study.add("proposed", {}, waiting=False).number, SCORES, 1, 1, None)
    assert study.best().number == 1
    assert [t.value for t in study.trials(["finished"])] == [0.5, math.inf, -math.inf, math.inf]


def test_scores_keep_infinity_and_nan_and_can_be_queried(study):
    odd = {"t": Score(math.nan, 0, -math.inf, math.nan, "acc", {"perplexity": math.inf, "nll": math.nan})}
    run_trial(study, 1.0, scores=odd)
    (score,) = study.trial(0).scores.values()
    assert math.isnan(score.value)
    assert math.isnan(score.high)
    assert score.low == -math.inf
    assert score.details["perplexity"] == math.inf
    assert math.isnan(score.details["nll"])
    program = "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute(sys.argv[2]).fetchall())"
    query = (
        "SELECT task, split, metric, scores.value IS NULL, json_extract(details, '$.perplexity'), state, seed"
        " FROM scores JOIN trials ON number = trial"
    )
    command = [sys.executable, "-c", program, str(study.folder / DATABASE), query]
    asked = subprocess.run(command, capture_output=True, text=True, check=True)
    assert asked.stdout.strip() == "[('t', 'validation', 'acc', 1, 'inf', 'finished', 3)]"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.add("other", {}, waiting=True), "kinds are anchor, default, proposed"),
        (lambda s: s.tell(0, None), "finished trials need a number"),
        (lambda s: s.tell(0, math.nan), "finished trials need a number"),
        (lambda s: s.tell(0, 1.0), "trial 0 is running"),  # never evaluated
        (lambda s: s.trial(7), "there is no trial 7"),
        (lambda s: s.give_back(7), "there is no trial 7"),
        (lambda s: s.evaluated(7, {}, 1, 1, "w"), "there is no trial 7"),
    ],
)
def test_what_a_state_rules_out_is_refused(study, call, message):
    study.add("proposed", {}, waiting=False, worker="w")
    before = study.trials()
    with pytest.raises(StudyError, match=message):
        call(study)
    assert study.trials() == before


def test_the_outcome_of_a_trial_given_back_is_refused(study):
    study.add("proposed", {}, waiting=False, worker="slow")
    assert study.give_back(0)
    assert not study.give_back(0)
    assert study.claim("quick").attempts == 1
    assert not study.evaluated(0, SCORES, 1, 1, "slow")
    assert not study.failed(0, "error", "slow")
    assert study.trial(0).scores == {}
    assert study.failed(0, "out of memory", "quick")
    assert (study.trial(0).state, study.trial(0).error) == ("evaluated", "out of memory")
    assert not study.evaluated(0, SCORES, 1, 1, "quick"), "an outcome is kept once"
    study.tell(0, None, state="failed")
    assert (study.trial(0).state, study.trial(0).error) == ("failed", "out of memory")
    assert not study.evaluated(0, SCORES, 1, 1, "quick")


def test_a_failing_change_leaves_nothing_behind(study):
    study.add("proposed", {}, waiting=False, worker="w")
    with pytest.raises(AttributeError):
        study.evaluated(0, {"good": SCORES["a"], "bad": 1.0}, 1, 1, "w")
    assert (study.trial(0).state, study.trial(0).scores) == ("running", {})
    assert study.evaluated(0, SCORES, 1, 1, "w")


# Equal parameters

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def reordered(value, shuffle):
    if isinstance(value, dict):
        keys = list(value)
        shuffle(keys)
        return {key: reordered(value[key], shuffle) for key in keys}
    return [reordered(item, shuffle) for item in value] if isinstance(value, list) else value


@given(st.dictionaries(st.text(), values, max_size=5), st.randoms(use_true_random=False))
def test_parameters_are_equal_in_any_order_of_keys(parameters, rng):
    other = reordered(parameters, rng.shuffle)
    assert digest(plain(parameters, "p", finite=True)) == digest(plain(other, "p", finite=True))
    assert dumps(other, ordered=True) == dumps(parameters, ordered=True)
    assert json.loads(dumps(parameters, ordered=True)) == parameters


@given(values, values)
def test_digests_differ_where_values_do(a, b):
    assert (digest(a) == digest(b)) == (
        json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True) or one_number(a) == one_number(b)
    )


def one_number(value):
    """Every value with its type spelt out, but integral floats as integers: Python's own == takes True for 1."""
    if isinstance(value, dict):
        return {key: one_number(item) for key, item in value.items()}
    if isinstance(value, list):
        return [one_number(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return type(value).__name__, value


def test_same_finds_the_first_that_is_finished_or_in_flight(study):
    parameters = {"alpha": {"a": 1.0, "b": "inf"}, "anchor": "average"}
    equal = {"anchor": "average", "alpha": {"b": "inf", "a": 1}}
    assert study.same(parameters) is None
    study.add("proposed", parameters, waiting=False, worker="w")
    assert study.same(equal).number == 0
    study.failed(0, "error", "w")
    assert study.same(equal) is None
    study.tell(0, None, state="failed")
    run_trial(study, 1.0, equal)
    run_trial(study, 2.0, parameters)
    assert study.same(parameters).number == 1
    assert study.same({**parameters, "alpha": {"a": 2.0, "b": "inf"}}) is None


@pytest.mark.parametrize(
    "bad", [{"alpha": {"g": math.inf}}, {"alpha": {"g": math.nan}}, {"alpha": {"g": object()}}, {"alpha": {1: 2}}]
)
def test_parameters_that_are_no_json_are_refused(study, bad):
    with pytest.raises(ConfigError, match=r"parameters\.alpha"):
        study.add("proposed", bad, waiting=True)
    assert study.trials() == []


def test_facts_are_replaced_and_keep_their_order(study):
    study.set_fact("experts", {"b": 1, "a": {"low": math.nan, "high": math.inf}})
    study.set_fact("seconds", 1.5)
    study.set_fact("seconds", 2.5)
    assert (study.fact("seconds"), study.fact("none")) == (2.5, None)
    assert list(study.fact("experts").items()) == [("b", 1), ("a", {"low": "nan", "high": "inf"})]


# Creating and opening


def test_a_study_is_opened_again_only_for_the_same_search(tmp_path):
    folder = tmp_path / "deep" / "x.study"
    with Study.open_or_create(folder, RECORD) as made:
        assert made.record == RECORD
        run_trial(made, 0.5)
    with Study.open_or_create(
        folder, {"identity": {"seed": 0.0, "recipe": {"alpha": (0.1, math.inf), "scale": 1}}}
    ) as again:
        assert [t.value for t in again.trials()] == [0.5]
        assert again.record == RECORD, "it is stored once"
    changed = {"seed": 0, "recipe": {"scale": 0.5, "alpha": [0.1, "inf"]}}
    with pytest.raises(
        ConfigError,
        match=r"x\.study.*'recipe\.scale' is 1\.0 there and 0\.5 here.*another output, or remove the folder",
    ):
        Study.open_or_create(folder, {"identity": changed})
    with pytest.raises(ConfigError, match=r"'recipe\.alpha\[0\]' is 0\.1 there and 0\.2 here"):
        Study.open_or_create(folder, {"identity": {"seed": 0, "recipe": {"scale": 1.0, "alpha": [0.2, "inf"]}}})
    with pytest.raises(ConfigError, match=r"'workers' is absent there and 2 here"):
        Study.open_or_create(folder, {"identity": {**RECORD["identity"], "workers": 2}})
    with pytest.raises(StudyExistsError, match=r"trials\.sqlite: there is a study here already"):
        Study.create(folder, RECORD)
    with pytest.raises(ConfigError, match="needs 'identity'"):
        Study.create(tmp_path / "y.study", {"seed": 0})


@pytest.fixture(scope="module")
def large_study(tmp_path_factory):
    """A closed study of many pages, to be copied."""
    folder = tmp_path_factory.mktemp("large") / "x.study"
    with Study.create(folder, RECORD) as made:
        for value in range(60):
            run_trial(made, value)
    return folder


def damaged(kind, path):
    if kind == "absent":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("trial,value\n" * 1000)
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "overwritten":
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2 :] = os.urandom(len(whole) - len(whole) // 2)
        path.write_bytes(whole)
    elif kind == "foreign":
        path.unlink()
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE trials (number)")
        connection.close()
    elif kind == "newer":
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA user_version = 99")
        connection.close()
    elif kind == "without a record":
        with sqlite3.connect(path) as connection:
            connection.execute("DELETE FROM meta")
        connection.close()


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "no study here"),
        ("empty", "no study of this engine"),
        ("text", "is damaged, or no database .* remove the folder"),
        ("truncated", "is damaged, or no database .* remove the folder"),
        ("overwritten", "is damaged, or no database .* remove the folder"),
        ("foreign", "no study of this engine"),
        ("newer", "has format 99, this version of the engine reads format 1"),
        ("without a record", "does not say what the study is"),
    ],
)
def test_what_is_no_study_is_named(tmp_path, large_study, kind, message, readonly):
    shutil.copytree(large_study, tmp_path / "x.study")
    damaged(kind, tmp_path / "x.study" / DATABASE)
    with pytest.raises(StudyError, match=rf"trials\.sqlite: .*{message}"):
        Study.open(tmp_path / "x.study", readonly)
    assert not any(opened.path.is_relative_to(tmp_path) for opened in locks._opened.values())


def test_what_a_killed_creation_or_removed_study_left_does_no_harm(tmp_path):
    folder = tmp_path / "x.study"
    with Study.create(folder, RECORD) as old:
        run_trial(old, 0.5)
        log = (folder / f"{DATABASE}-wal").read_bytes()
        assert log
    (folder / DATABASE).unlink()
    (folder / f"{DATABASE}-wal").write_bytes(log)
    (folder / f".{DATABASE}.123.tmp").write_bytes(b"SQLite format 3\0half")
    (folder / f".{DATABASE}.123.tmp-journal").write_bytes(b"half")
    (folder / "grams").mkdir()
    with Study.create(folder, RECORD) as new:
        assert new.trials() == []
    assert sorted(path.name for path in folder.iterdir()) == ["grams", "lock", DATABASE]


def test_creation_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(StudyError, match=r"cannot be written .*No space left"):
        Study.create(tmp_path / "x.study", RECORD)
    assert [path.name for path in (tmp_path / "x.study").iterdir()] == ["lock"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="cannot be made"):
        Study.create(tmp_path / "file", RECORD)


def test_threads_that_create_at_once_get_one_study(tmp_path):
    errors, made = [], []

    def create():
        try:
            with Study.open_or_create(tmp_path / "x.study", RECORD) as study:
                made.append(study.add("proposed", {}, waiting=True).number)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(made) == list(range(8))


# Other readers and writers


def test_readers_see_whole_transactions_while_threads_write(study):
    """Through one shared study and through readers of their own; a told trial never lacks its scores."""
    stop, seen, errors = threading.Event(), [], []

    def read():
        try:
            while not stop.is_set():
                with Study.open(study.folder, readonly=True) as reader:
                    found = reader.trials()
                    assert all((t.state == "running") == (t.scores == {}) for t in found)
                    events = [event for t in found for event in (t.ask_event, t.tell_event) if event is not None]
                    assert sorted(events) == list(range(len(events)))
                    seen.append(len(found))
        except BaseException as error:
            errors.append(error)

    def write():
        try:
            for value in range(25):
                run_trial(study, value)
        except BaseException as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write) for _ in range(2)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert errors == []
    assert [t.number for t in study.trials()] == list(range(50))
    assert len(set(seen)) > 1, "it read while the others wrote"


def test_readonly_changes_nothing(study):
    study.add("proposed", {}, waiting=True)
    with Study.open(study.folder, readonly=True) as reader:
        for call in (
            lambda: reader.add("proposed", {}, waiting=True),
            lambda: reader.set_fact("a", 1),
            lambda: reader.claim("w"),
            reader.join,
            lambda: reader.drive().__enter__(),
        ):
            with pytest.raises(StudyError, match="for reading only"):
                call()
        assert len(reader.trials()) == 1
    with pytest.raises(StudyError, match="is closed"):
        reader.trials()


READ_ONLY_PLACE = """
import os, sys
from bmm_engine.searching.study import Study
if os.getuid() == 0:
    os.setuid(65534)  # permissions do not bind root
assert not os.access(sys.argv[1], os.W_OK)
with Study.open(sys.argv[1], readonly=True) as study:
    print([t.value for t in study.trials()], study.driver_alive())
"""


@pytest.mark.parametrize("how", ["closed", "closed and looked at", "killed"])
def test_a_study_is_read_where_nothing_can_be_written(tmp_path, how, shared_tmp):
    folder = tmp_path / "x.study"
    with Study.create(folder, RECORD) as made:
        run_trial(made, 0.5)
        if how == "killed":  # as SIGKILL leaves it: the log is not yet in the database
            shutil.copytree(folder, shared_tmp / "x.study")
            assert (shared_tmp / "x.study" / f"{DATABASE}-wal").stat().st_size > 0
    if how != "killed":
        if how == "closed and looked at":
            Study.open(folder, readonly=True).close()
        shutil.copytree(folder, shared_tmp / "x.study")
    folder = shared_tmp / "x.study"
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    try:
        done = subprocess.run([sys.executable, "-c", READ_ONLY_PLACE, str(folder)], capture_output=True, text=True)
    finally:
        folder.chmod(0o755)
    assert (done.stdout, done.stderr) == ("[0.5] False\n", "")


@pytest.fixture
def shared_tmp(tmp_path_factory):
    """A folder that other users can reach; pytest's own are private."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_a_database_that_others_keep_busy_is_named(study, monkeypatch):
    monkeypatch.setattr(database, "BUSY_S", 0.05)
    with Study.open(study.folder) as blocked, study._database.writing():
        with pytest.raises(StudyBusyError, match=r"trials\.sqlite: another process has kept it busy"):
            blocked.add("proposed", {}, waiting=True)
        assert blocked.trials() == []
    with Study.open(study.folder) as free:
        free.add("proposed", {}, waiting=True)


def test_the_study_does_without_torch():
    """Reports and tools open studies at once, and so do the processes that these tests kill."""
    program = "import sys, bmm_engine.searching.study; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )


# Kills

WORK = """
import random, sys
from bmm_engine.evaluators.scores import Score
from bmm_engine.searching.study import Study
rng = random.Random(int(sys.argv[2]))
with Study.open(sys.argv[1]) as study, study.drive():
    for trial in study.trials(["running"]):
        study.give_back(trial.number)
    print("ready", flush=True)
    while True:
        trial = study.claim("w") or study.add("proposed", {"v": rng.random()}, waiting=False, worker="w")
        value = trial.parameters["v"]
        scores = {task: Score(value, 10, 0.0, 1.0, "accuracy", {"loss": value}) for task in "abc"}
        assert study.evaluated(trial.number, scores, 1.0, 0.5, "w")
        print("evaluated", trial.number, value, flush=True)
        for ready in study.trials(["evaluated"]):
            study.tell(ready.number, ready.scores["b"].value)
            print("told", ready.number, ready.parameters["v"], flush=True)
"""


def killed_at_random(rng, program, *arguments, most_s):
    """Lines that the program printed after "ready", until it was killed at a random moment."""
    with subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        # Sleeps while the pipe fills: far fewer lines than fit into it are printed in this time.
        threading.Event().wait(rng.uniform(0, most_s))
        child.kill()
        return [line.split() for line in child.stdout.read().splitlines() if not line.startswith("ready")]


def test_nothing_that_was_told_is_lost_by_kills(tmp_path):
    rng = random.Random(0)
    folder = tmp_path / "x.study"
    Study.create(folder, RECORD).close()
    told, evaluated, interrupted = {}, {}, 0
    for kill in range(20):
        for line in killed_at_random(rng, WORK, str(folder), str(kill), most_s=0.08):
            if len(line) == 3:  # the last may be cut off
                (told if line[0] == "told" else evaluated)[int(line[1])] = float(line[2])
        with Study.open(folder) as study:
            assert not study.driver_alive(), "its lock died with it"
            trials = study.trials()
            with study._database.reading() as connection:
                assert connection.execute("PRAGMA integrity_check").fetchall()[0][0] == "ok"
            events = [e for t in trials for e in (t.ask_event, t.tell_event) if e is not None]
        assert [t.number for t in trials] == list(range(len(trials)))
        assert sorted(events) == list(range(len(events)))
        for number, value in evaluated.items():
            assert trials[number].scores["c"].value == value
        for number, value in told.items():
            assert (trials[number].state, trials[number].value) == ("finished", value)
        for trial in trials:
            assert len(trial.scores) == (0 if trial.state in ("waiting", "running") else 3)
        interrupted += any(t.state != "finished" for t in trials)
    assert len(told) > 20
    assert interrupted > 2, "kills must hit trials on their way"


CREATE = """
import sys
from pathlib import Path
from bmm_engine.searching.study import Study
print("ready", flush=True)
for i in range(10000):
    Study.create(Path(sys.argv[1]) / f"{i}.study", {"identity": {"i": i}}).close()
    print("made", i, flush=True)
"""


def test_a_killed_creation_leaves_nothing_or_a_study(tmp_path):
    rng = random.Random(1)
    for kill in range(6):
        place = tmp_path / str(kill)
        place.mkdir()
        made = sum(len(line) == 2 for line in killed_at_random(rng, CREATE, str(place), most_s=0.1))
        for folder in place.iterdir():
            with Study.open_or_create(folder, {"identity": {"i": int(folder.stem)}}) as study:
                assert study.trials() == []
            assert not list(folder.glob(".*")), "leftovers are cleaned up"
        assert len(list(place.iterdir())) >= made


# Rows that were changed by hand


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE trials SET parameters = '{'", "trial 0: parameters is no JSON"),
        ("UPDATE trials SET parameters = '[1]'", "trial 0: parameters are no mapping"),
        (f"UPDATE trials SET parameters = '{'[' * 5000}'", "trial 0: parameters is no JSON"),
        ("UPDATE trials SET parameters = x'ff'", "trial 0: parameters is no JSON"),
        ("UPDATE trials SET value = 'high'", "trial 0: value is 'high', of another type"),
        ("UPDATE trials SET finished_at = 'yesterday'", "trial 0: finished_at is 'yesterday', which is no time"),
        ("UPDATE scores SET details = 'null'", "the score of trial 0 on task 'b': details are no mapping"),
        ('UPDATE scores SET details = \'{"loss": "x"}\'', "task 'b': details are no mapping of numbers"),
        ("UPDATE scores SET samples = 'ten'", "task 'b': samples is 'ten'"),
        ("UPDATE meta SET value = '{'", "its record is no JSON"),
        ("UPDATE meta SET value = '{}'", "does not say what the study is"),
        ("UPDATE facts SET value = 'x'", "the fact 'best' is no JSON"),
    ],
)
def test_a_row_that_was_changed_by_hand(tmp_path, statement, message):
    with Study.create(tmp_path / "x.study", RECORD) as study:
        run_trial(study, 0.5)
        study.set_fact("best", 0)
    with sqlite3.connect(tmp_path / "x.study" / DATABASE) as connection:
        connection.execute(statement)
    connection.close()

    def read():
        with Study.open(tmp_path / "x.study") as study:
            return study.fact("best"), study.trials()

    with pytest.raises(StudyError, match=message) as caught:
        read()
    assert str(tmp_path / "x.study" / DATABASE) in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_making_a_study_removes_only_what_sqlite_left(tmp_path):
    for name in (
        "trials.sqlite-wal",
        ".trials.sqlite.12.tmp-journal",
        "trials.sqlite-backup",
        ".trials.sqlite.tmp-mine",
    ):
        (tmp_path / name).write_text("x")
    Study.create(tmp_path, {"identity": {}}).close()
    assert {"trials.sqlite-backup", ".trials.sqlite.tmp-mine"} <= {p.name for p in tmp_path.iterdir()}
    assert not (tmp_path / ".trials.sqlite.12.tmp-journal").exists()


def test_a_search_refuses_a_strangers_folder_of_its_name(tmp_path):
    folder = tmp_path / "out.study"
    for name in ("lock", "grams/0.safetensors", "grams/.0.safetensors.1-ab.partial", ".shared-ab/lock"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    check_study_folder(folder)  # a search that was killed before it had a study
    (folder / "best.yaml").write_text("precious")
    with pytest.raises(OutputExistsError, match=r"out\.study: holds no study, but 'best\.yaml'"):
        check_study_folder(folder)
    (folder / "trials.sqlite").touch()
    check_study_folder(folder)
