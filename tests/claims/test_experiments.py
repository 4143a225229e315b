"""Experiments: declared before they run, decided by rule, recorded, and shown on the page."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from nanosd3.claims import __main__ as command
from nanosd3.claims import catalogue, records
from nanosd3.claims import page as page_module
from nanosd3.claims.catalogue import EXPERIMENTS
from nanosd3.claims.experiment import Conditions, Experiment, cell, lead, once, table_of, verdict
from nanosd3.claims.page import PAGE, committed, copy_results, page
from nanosd3.claims.records import RESULTS, carry_out, finished, paths_of
from nanosd3.cli import run_main
from nanosd3.errors import InputError

RAN: list[Conditions] = []


def run(conditions: Conditions) -> dict:
    RAN.append(conditions)
    return {"value": len(conditions.seeds), "table": table_of(["seeds"], [[3]])}


def draw(results: dict, path: Path) -> None:
    path.write_bytes(b"png")


TOY = Experiment(
    name="x-toy-1",
    claim="Three is odd.",
    source="Euclid",
    measured="The number of seeds.",
    rule="Supported if it is 3.",
    minutes=0.1,
    run=run,
    decide=lambda results: verdict(results["value"] == 3, results["value"] == 2),
    plot=draw,
    remark="A toy.",
)


@pytest.fixture
def wing(tmp_path, monkeypatch) -> Path:
    """A catalogue of two toys, and a page of their own; returns the folder for records."""
    RAN.clear()
    toys = {"x-toy-1": TOY, "x-toy-2": replace(TOY, name="x-toy-2", remark="")}
    monkeypatch.setattr(command, "EXPERIMENTS", toys)
    for module in (records, page_module):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(page_module, "PAGE", tmp_path / "README.md")
    monkeypatch.setattr(command, "PAGE", tmp_path / "README.md")
    return tmp_path / "out"


def claims(*words: object) -> int:
    return run_main(lambda: command.main([str(word) for word in words]))


def refused(capsys, *words: object) -> str:
    assert claims(*words) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and said.err.startswith("error: ")
    return said.err


# --- one experiment -----------------------------------------------------------------------------


def test_declares_runs_decides_and_records(wing, capsys):
    assert claims("x-toy-1", "--out", wing, "--run", "elsewhere") == 0
    said = capsys.readouterr().out
    assert said.index("Supported if it is 3.") < said.index("SUPPORTED")
    for text in TOY.declaration.values():
        assert text in said
    assert RAN == [Conditions((0, 1, 2), False, Path("elsewhere"), wing)]
    record = json.loads((wing / "x-toy-1.json").read_text())
    assert {key: record[key] for key in TOY.declaration} == TOY.declaration
    assert record["verdict"] == "supported" and record["results"]["value"] == 3
    assert record["seeds"] == [0, 1, 2] and record["fast"] is False and record["minutes"] == 0.1
    assert record["thread_seconds"] >= 0
    assert set(record["machine"]) == {"processor", "threads", "torch", "commit"}
    assert (wing / "x-toy-1.png").read_bytes() == b"png"


def test_one_seed_decides_nothing(wing):
    always = replace(TOY, decide=lambda results: verdict(True, False))
    for seeds, word in ((0,), "undecided"), ((0, 1), "supported"):
        assert carry_out(always, Conditions(seeds, False, wing, wing))["verdict"] == word


def test_declares_before_it_runs(wing, capsys):
    def fails(conditions: Conditions) -> dict:
        assert TOY.rule in capsys.readouterr().out
        raise InputError("no data")

    with pytest.raises(InputError):
        carry_out(replace(TOY, run=fails), Conditions((0,), False, wing, wing))
    assert not list(wing.glob("*.json"))


def test_a_shared_study_runs_once_for_a_run(tmp_path, monkeypatch):
    """Conditions that are equal share it, until another run is at the same place."""
    asked = []
    shared = once(lambda conditions: asked.append(conditions) or len(asked))
    monkeypatch.chdir(tmp_path)

    def conditions(seeds: int = 2) -> Conditions:
        return Conditions(tuple(range(seeds)), True, Path("run"), tmp_path)

    assert [shared(conditions()), shared(conditions()), shared(conditions(1))] == [1, 1, 2]
    Path("run").mkdir()
    for stages in {}, {"flow": {}}:
        Path("run/run.json").write_text(json.dumps(stages))
        made = len(asked)
        assert shared(conditions()) == shared(conditions()) == made + 1
    shared_opening = once(lambda run: asked.append(run) or len(asked))
    assert shared_opening(Path("run")) == shared_opening(Path("run")) == len(asked)


@pytest.mark.parametrize(("seeds", "word"), [(1, "undecided"), (2, "refuted"), (3, "supported")])
def test_all_three_verdicts(wing, seeds, word):
    assert claims("x-toy-1", "--out", wing, "--seeds", seeds) == 0
    assert json.loads((wing / "x-toy-1.json").read_text())["verdict"] == word


def test_what_is_finished_is_not_repeated(wing, capsys):
    claims("x-toy-2", "--out", wing)
    assert claims("all", "--out", wing) == 0 and len(RAN) == 2
    before = (wing / "x-toy-1.json").read_bytes()
    assert claims("all", "--out", wing) == 0 and len(RAN) == 2
    assert claims("x-toy-1", "--out", wing) == 0 and len(RAN) == 2
    assert "x-toy-1: SUPPORTED" in capsys.readouterr().out
    (wing / "x-toy-1.png").unlink()  # stopped between the two files
    assert claims("all", "--out", wing) == 0 and len(RAN) == 3
    assert (
        json.loads(before)["results"] == json.loads((wing / "x-toy-1.json").read_text())["results"]
    )


def test_fast_results_replace_no_others(wing):
    claims("x-toy-1", "--out", wing)
    before = (wing / "x-toy-1.json").read_bytes()
    assert claims("x-toy-1", "--out", wing, "--fast", "--seeds", 1) == 0
    assert (wing / "x-toy-1.json").read_bytes() == before and RAN[1].fast
    assert json.loads((wing / "fast/x-toy-1.json").read_text())["fast"] is True


def test_other_seeds_are_refused(wing, capsys):
    claims("x-toy-1", "--out", wing)
    before = (wing / "x-toy-1.json").read_bytes()
    capsys.readouterr()
    said = refused(capsys, "x-toy-1", "--out", wing, "--seeds", 2)
    assert "x-toy-1.json: has 3 seeds, --seeds asks for 2" in said
    assert (wing / "x-toy-1.json").read_bytes() == before and len(RAN) == 1


def test_a_rule_changed_afterwards_is_refused(wing, capsys):
    claims("x-toy-1", "--out", wing)
    capsys.readouterr()
    changed = replace(TOY, rule="Supported if it is 3 or 4.")
    with pytest.raises(InputError, match="another rule"):
        finished(changed, Conditions((0, 1, 2), False, wing, wing))
    with pytest.raises(InputError, match="another rule"):
        copy_results({"x-toy-1": changed}, wing)
    assert not (page_module.RESULTS / "x-toy-1.json").exists()


def test_a_source_may_be_said_better_afterwards(wing):
    claims("x-toy-1", "--out", wing)
    better = {"x-toy-1": replace(TOY, source="Euclid, book 7", remark="Still odd.")}
    assert copy_results(better, wing) == ["x-toy-1"]
    text = page(better, committed(better))
    assert "*(Euclid, book 7)*" in text and "Still odd." in text


def test_not_a_number_is_no_result(wing):
    broken = replace(TOY, run=lambda conditions: {"value": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        carry_out(broken, Conditions((0,), False, wing, wing))
    assert not list(wing.glob("*.json"))


# --- the command line ---------------------------------------------------------------------------


def test_list(wing, capsys):
    assert claims("list", "--out", wing) == 0
    assert capsys.readouterr().out.count("not run yet") == 2
    claims("x-toy-1", "--out", wing)
    claims("page", "--out", wing)
    capsys.readouterr()
    for folder in (wing, "nowhere"):  # the page's verdict, where there is no newer one
        assert claims("list", "--out", folder) == 0
        said = capsys.readouterr().out
        assert "x-toy-1" in said and "0.1 min  Three is odd." in said and "Euclid" in said
        assert said.count("not run yet") == 1 and said.count("SUPPORTED") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["x-toy-9"], "NAME: no experiment 'x-toy-9'"),
        (["list", "--seeds", "2"], "--seeds: means nothing to `list`"),
        (["list", "--fast"], "--fast: means nothing to `list`"),
        (["page", "--threads", "2"], "--threads: means nothing to `page`"),
        (["page", "--run", "x"], "--run: means nothing to `page`"),
        (["page", "--out", "nowhere"], "nowhere: no such folder"),
        (["x-toy-1", "--seeds", "0"], "--seeds: must be at least 1"),
        (["x-toy-1", "--threads", "two"], "--threads: expected a whole number"),
        ([], "NAME"),
    ],
)
def test_bad_input(wing, capsys, words, said):
    assert said in refused(capsys, *words)
    assert not RAN and not wing.exists()


def test_out_that_is_a_file(wing, capsys):
    wing.write_text("")
    assert "is a file" in refused(capsys, "x-toy-1", "--out", wing)


@pytest.mark.parametrize("field", sorted(records.FIELDS))
def test_records_that_lack_something(wing, capsys, field):
    claims("x-toy-1", "--out", wing)
    record = wing / "x-toy-1.json"
    content = json.loads(record.read_text())
    del content[field]
    record.write_text(json.dumps(content))
    capsys.readouterr()
    for words in (["x-toy-1"], ["list"], ["page"]):
        assert f"it has no {field}" in refused(capsys, *words, "--out", wing)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"verdict": "true"}'])
def test_damaged_records(wing, capsys, content):
    claims("x-toy-1", "--out", wing)
    record = wing / "x-toy-1.json"
    if content == '{"verdict": "true"}':
        content = json.dumps(json.loads(record.read_text()) | json.loads(content))
    record.write_text(content)
    capsys.readouterr()
    for words in (["x-toy-1"], ["list"], ["page"]):
        assert "x-toy-1.json: " in refused(capsys, *words, "--out", wing)


# --- the page -----------------------------------------------------------------------------------


def test_page_of_toys(wing, capsys):
    claims("x-toy-2", "--out", wing)
    assert claims("page", "--out", wing) == 0
    assert "x-toy-2" in capsys.readouterr().out
    text = page_module.PAGE.read_text()
    assert "| x-toy-1 | Three is odd. | not run yet |" in text and "## x-toy-1" not in text
    assert "| 3 |" in text and "Measured together" not in text
    claims("x-toy-1", "--out", wing)
    claims("page", "--out", wing)
    text = page_module.PAGE.read_text()
    assert text.index("## x-toy-1") < text.index("## x-toy-2")  # the catalogue's order
    parts = (
        "| [x-toy-1](#x-toy-1) | Three is odd. | **supported** |",
        "**Rule.** Supported if",
        "*(Euclid)*",
        "![Plot for the claim: Three is odd.](results/x-toy-1.png)",
        "| 3 |",
        "Seeds 0, 1, 2;",
    )
    for part in parts:
        assert part in text
    assert text.count("A toy.") == 1
    shared = "Measured together with [x-toy-1](#x-toy-1), whose table has the figures."
    assert text.count("| 3 |") == text.count(shared) == 1  # both have the same
    assert text.index("| 3 |") < text.index("## x-toy-2") < text.index(shared)
    assert text.count("![Plot") == text.count("The plot of [x-toy-1](#x-toy-1) shows this") == 1
    assert (page_module.RESULTS / "x-toy-1.png").exists()
    page_module.PAGE.unlink()
    assert claims("page") == 0 and page_module.PAGE.read_text() == text


def test_page_takes_no_fast_results(wing, capsys):
    claims("x-toy-1", "--out", wing, "--fast")
    capsys.readouterr()
    assert "comes from --fast" in refused(capsys, "page", "--out", wing / "fast")
    assert "has no results" in refused(capsys, "page", "--out", wing)
    assert not page_module.RESULTS.exists()


def test_page_says_what_training_cost(wing):
    claims("x-toy-1", "--out", wing)
    record = json.loads((wing / "x-toy-1.json").read_text()) | {"remark": ""}
    assert "training" not in page_module.section(record, "x-toy-1", "x-toy-1")
    record["results"]["training_seconds"] = 41.7
    text = page_module.section(record, "x-toy-1", "x-toy-1")
    assert "(training its networks, now or before: 42 s)" in text


def test_the_page_is_that_of_the_records():
    assert PAGE.read_text(encoding="utf-8") == page(EXPERIMENTS, committed(EXPERIMENTS)), (
        "run python -m nanosd3.claims page"
    )


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_records(path):
    """Of the code's rule, decided by it, in full, with a plot."""
    record, experiment = records.read_record(path), EXPERIMENTS[path.stem]
    records.check_declaration(record, experiment, path)
    assert record["verdict"] == experiment.decide(record["results"])
    assert record["fast"] is False and len(record["seeds"]) >= 3
    assert paths_of(RESULTS, path.stem)[1].stat().st_size < 300_000


# --- rules --------------------------------------------------------------------------------------


def test_catalogue():
    for name, experiment in EXPERIMENTS.items():
        assert name == experiment.name and re.fullmatch(r"[a-z0-9-]+", name)
        assert all(text.strip() for text in experiment.declaration.values())
        assert experiment.minutes <= 10
        assert "upported if" in experiment.rule and "efuted if" in experiment.rule


def test_every_rule_is_tested():
    """Some test names each experiment, or the constant that it is."""
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("*.py"))
    constants = {id(v): k for k, v in vars(catalogue).items() if isinstance(v, Experiment)}
    for name, experiment in EXPERIMENTS.items():
        assert f'"{name}"' in tests or constants[id(experiment)] in tests, name


def test_lead():
    assert lead([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == (2.0, 1.0)
    assert lead([1.0], [2.0]) == (1.0, float("inf"))
    with pytest.raises(ValueError, match="longer"):
        lead([1.0], [2.0, 3.0])


def test_verdict():
    assert [verdict(True, False), verdict(False, True), verdict(False, False)] == [
        "supported", "refuted", "undecided"]  # fmt: skip
    with pytest.raises(AssertionError):
        verdict(True, True)


def test_cells():
    shown = [cell(x) for x in (0.12345, 1234.6, 7, "OT", [1.0, 2.0, 3.0], [2.0, 2.0])]
    assert shown == ["0.123", "1235", "7", "OT", "2 (1 to 3)", "2"]
    assert table_of(["a", "b"], [[1, 0.5]]) == {"columns": ["a", "b"], "rows": [["1", "0.5"]]}


def test_processor_and_commit(monkeypatch, tmp_path):
    host = records.describe_host()
    assert host["processor"] and re.fullmatch(r"[0-9a-f]{7,}(-dirty)?|[0-9.]+", str(host["commit"]))
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert re.fullmatch(r"[0-9.]+", records.commit())
