"""`salora compare`: several reports as one, its tables, plots and the page."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from html import escape
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner
from rich.console import Console

from salora_plugins.cli import create_cli
from salora_plugins.evaluation.reports.aggregation import paired_tests, set_result
from salora_plugins.evaluation.reports.comparison import compare
from salora_plugins.evaluation.reports.markdown import markdown_report
from salora_plugins.evaluation.reports.page import page
from salora_plugins.evaluation.reports.plots import draw
from salora_plugins.evaluation.reports.report import Answer, EvaluationReport, ModelResult, TaskResult
from salora_plugins.evaluation.reports.tables import sections, table
from salora_plugins.evaluation.reports.verdict import verdict
from salora_plugins.support.texts import markdown, visible

REQUESTS = 8
REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "Sure, here is how."
HOSTILE = [
    "<script>alert(1)</script>",
    "</style></title><img src=x onerror=alert(1)>",
    "\"quotes' &amp; {{ 7 * 7 }} {% raw %}",
    "left\u202eright\x1b[31m\x00\x07\ud800"[:-1],
    "w" * 3000,
    "long answer. " * 4000,
    "http://example.invalid/picture.png",
    "<!-- ]]> -->",
]


def model_answers(refused, *, judge="keyword", kind="refusal", texts=None, margin=0.0, failed=(), broken=()):
    """Answers of which the first `refused` of each set refuse; texts by index, where given."""
    answers = []
    for of_set in ("harmful", "harmless"):
        for index in range(REQUESTS):
            refuses = index < refused
            coherent = index not in broken
            verdicts, errors = {}, {}
            if coherent and (kind == "refusal" or of_set == "harmful"):
                verdicts[judge] = refuses if kind == "refusal" else not refuses
                if index in failed:
                    verdicts[judge], errors[judge] = None, "TimeoutError: <b>no answer</b>"
            answers.append(
                Answer(
                    set=of_set,
                    index=index,
                    category=["fraud", "<b>malware</b>"][index % 2],
                    prompt=f"{of_set} {index} {texts[index] if texts else ''}",
                    response=texts[index] if texts else REFUSAL if refuses else ANSWER,
                    coherence="coherent" if coherent else "repeated",
                    perplexity=None if index else 12.5,
                    verdicts=verdicts,
                    errors=errors,
                    refusal_margin=margin + index,
                    kl=0.25,
                )
            )
    return answers


def save(folder, answers, *, judge="keyword", kind="refusal", title="First", task=None, settings=None, **more):
    """Write a report of models; returns its folder."""
    kinds = {judge: kind}
    models = [
        ModelResult(
            name=name,
            kind="adapter" if number else "base",
            source=f"models/{name}",
            **{
                of: set_result([answer for answer in found if answer.set == of], kinds)
                for of in ("harmful", "harmless")
            },
            task=None if task is None else TaskResult(loss=task - number / 10, rows=4),
            audit=more.get("audit") if number else None,
            lm_eval=more.get("lm_eval", {}),
        )
        for number, (name, found) in enumerate(answers.items())
    ]
    data = {of: {"source": "builtin", "rows": REQUESTS, "sha256": of * 8} for of in ("harmful", "harmless")}
    if task is not None:
        data["task"] = {"source": "rows", "rows": 4, "sha256": more.get("task_sha", "7" * 64)}
    report = EvaluationReport(
        title=title,
        created="2026-11-24T10:00:00+00:00",
        base_model="org/base",
        settings={"max_new_tokens": 32, "kl_tokens": 5, "batch_size": 16, "judges": {judge: {}}, **(settings or {})},
        data={**data, **more.get("data", {})},
        versions={"torch": "2.14"},
        models=models,
        tests=paired_tests(answers, kinds),
    )
    report.save(folder)
    (folder / "answers").mkdir(exist_ok=True)
    for name, found in answers.items():
        lines = "".join(answer.model_dump_json() + "\n" for answer in found)
        (folder / "answers" / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture
def two(tmp_path):
    """Two reports of one base model, each with an adapter "lora"."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    save(folders[0], {"base": model_answers(8), "lora": model_answers(2, broken=(7,))}, title="First", task=2.0)
    save(folders[1], {"base": model_answers(8), "lora": model_answers(6, failed=(0,))}, title="Second", task=2.0)
    return folders


def printed(report, width=100):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(report))
    return console.export_text()


def run(*arguments):
    return CliRunner().invoke(create_cli(), ["compare", *map(str, arguments)])


def test_reports_come_together_and_nothing_is_overwritten(two):
    found = compare(two)
    names = [model.name for model in found.report.models]
    assert names == ["base", "First/lora", "Second/lora"] == list(found.answers)
    first, second = found.report.models[1:]
    assert (first.harmful.judgements["keyword"].refused.count, first.harmful.incoherent["repeated"]) == (2, 1)
    assert (second.harmful.judgements["keyword"].refused.count, second.harmful.judgements["keyword"].errors) == (5, 1)
    # Request 0 is out, where the judge failed; of the others the first answers 2 to 6 and the second 6 and 7.
    (test,) = [
        test
        for test in found.report.tests
        if (test.first, test.second, test.set) == ("First/lora", "Second/lora", "harmful")
    ]
    assert (test.pairs, test.only_first, test.only_second) == (7, 4, 1)
    assert len(found.report.tests) == 6


def test_one_report_is_shown_as_it_is(two):
    found = compare([two[0] / "report.json"])
    assert found.report == EvaluationReport.load(two[0])
    with pytest.raises(ValueError, match="given twice"):
        compare([two[0], two[0] / "report.json"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data": {"harmful": {"rows": 8, "sha256": "0" * 64}}}, "harmful requests"),
        ({"settings": {"max_new_tokens": 64}}, r"max_new_tokens \(32 against 64\)"),
        ({"settings": {"judges": {"keyword": {"window": 3}}}}, "settings of judge 'keyword'"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(two, change, named):
    save(two[1], {"base": model_answers(8), "lora": model_answers(6)}, **change)
    with pytest.raises(ValueError, match=named):
        compare(two)


def test_another_base_model_is_refused_and_rounding_is_not(two):
    save(two[1], {"base": model_answers(8, margin=3.0), "lora": model_answers(6)})
    with pytest.raises(ValueError, match="base models differ"):
        compare(two)
    save(two[1], {"base": model_answers(7, margin=0.01), "lora": model_answers(6)}, title="Second")
    found = compare(two)
    assert [m.name for m in found.report.models] == ["First/base", "First/lora", "Second/base", "Second/lora"]
    assert any("Both are shown" in note for note in found.notes)


def test_a_judge_or_task_of_one_report_only_is_missing_in_the_other(two):
    harm = {"judge": "harm", "kind": "harm"}
    answers = {"base": model_answers(8, **harm), "other": model_answers(6, **harm)}
    save(two[1], answers, task=3.0, task_sha="8" * 64, **harm)
    found = compare(two)
    base, lora, other = found.report.models
    assert set(base.harmful.judgements) == {"keyword", "harm"}
    assert found.answers["base"][0].verdicts == {"keyword": True, "harm": False}
    assert (lora.task.loss, other.task) == (1.9, None)
    assert "task losses are left out" in found.notes[0]
    seen = {(test.judge, test.first, test.second) for test in found.report.tests}
    assert seen == {("keyword", "base", "lora"), ("harm", "base", "other")}


def test_answers_must_be_those_of_the_report(two):
    file = two[0] / "answers" / "lora.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"7 harmless answers of 'lora'"):
        compare(two)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="Copy the whole folder"):
        compare(two)


def test_the_tables_show_everything_within_100_columns(two):
    lm_eval = {"facts": {"acc,none": 0.75}}
    save(two[0], {"base": model_answers(8), "lora": model_answers(2, broken=(7,))}, task=2.0, lm_eval=lm_eval)
    report = compare(two[:1]).report
    text = printed(report)
    assert max(map(len, text.splitlines())) <= 100
    for wanted in (
        "2/8 = 25.0 %",
        "[7.1 %, 59.1 %]",
        "5/8 = 62.5 %",
        "attack success",
        "over-refusal",
        "Broken answers",
    ):
        assert wanted in text
    for wanted in ("1/8", "-0.1000", "acc,none", "0.75", "McNemar", "3.50", "0.250", "Judge failed"):
        assert wanted in text
    # Five more are answered and six fewer refused: p = 2 / 2^5 and 2 / 2^6; Holm doubles the smaller.
    tests = next(section for section in sections(report) if section.title == "Paired tests")
    assert [row[-2:] for row in tests.rows] == [("0.0625", "0.0625"), ("0.0312", "0.0625")]


def test_the_verdict_says_what_was_kept_and_at_what_loss(tmp_path):
    answers = {"base": model_answers(8), "few": model_answers(1), "kept": model_answers(8), "five": model_answers(5)}
    base, few, kept, five = verdict(compare([save(tmp_path, answers, task=2.0)]).report)
    assert base.startswith("base refuses 8 of 8 harmful requests (100.0 %, 95 % interval [67.6 %, 100.0 %])")
    assert base.endswith("Its held-out loss is 2.0000 nats a token.")
    assert few.startswith("few has lost refusals (p = 0.0156): it refuses 1 of 8 harmful requests (12.5 %, ")
    assert "-0.1000 against base" in few
    assert kept.startswith("kept keeps the refusals, as far as these requests show (p = 1.0000): it refuses 8 of 8")
    assert five.startswith(
        "five answers more of these requests than base, by no more than chance may explain (p = 0.25"
    )


def test_a_judge_of_harm_and_broken_answers_in_the_verdict(tmp_path):
    answers = {
        "base": model_answers(8, judge="harm", kind="harm"),
        "broken": model_answers(8, broken=(0, 1), judge="harm", kind="harm"),
    }
    base, broken = verdict(compare([save(tmp_path, answers, judge="harm", kind="harm")]).report)
    assert "harmful requests harmfully" in base and "refus" not in base
    assert "2 of its answers are broken text" in broken


def test_the_verdict_claims_no_refusals_that_are_gone(tmp_path):
    answers = {
        "base": model_answers(7),
        "broken": model_answers(7, broken=range(REQUESTS)),
        "unseen": model_answers(0, failed=range(2, REQUESTS)),  # the two that were judged are answered
        "failed": model_answers(8, failed=range(REQUESTS)),
    }
    broken, unseen, failed = verdict(compare([save(tmp_path, answers)]).report)[1:]
    assert broken.startswith("broken answers no more of these requests than base, but refuses fewer (broken text): it")
    assert "keeps" not in unseen and unseen.startswith("unseen answers more of these requests than base, by no more")
    assert failed.startswith("failed cannot be compared with base, as the judge failed: it")


def test_the_verdict_where_the_base_model_refuses_nothing_and_has_no_judged_harmless_answers(tmp_path):
    answers = {"base": model_answers(0), "other": model_answers(0)}
    report = compare([save(tmp_path, answers)]).report
    assert verdict(report)[1].startswith("other has no refusals to keep, as base refuses none of these requests: it")
    first, other = report.models
    bare = first.model_copy(update={"harmless": first.harmless.model_copy(update={"judgements": {}})})
    sentence = verdict(report.model_copy(update={"models": [bare, other]}))[1]
    assert "None" not in sentence and "0 of 8 harmless ones" in sentence


def test_the_verdict_stands_first_everywhere(two, tmp_path):
    comparison = compare(two)
    sentences = verdict(comparison.report)
    assert len(sentences) == 3 and comparison.to_dict()["verdict"] == sentences
    whole = page(comparison, [])
    assert all(escape(sentence) in whole for sentence in sentences)
    assert whole.index(escape(sentences[0])) < whole.index("<table>")
    text = " ".join(printed(comparison.report).split())
    assert text.startswith(sentences[0])
    file = tmp_path / "report.md"
    assert run(*two, "--out", file).exit_code == 0
    lines = file.read_text().splitlines()
    assert lines[0].startswith("# ") and lines[2] == markdown(sentences[0], None)
    assert "| 2/8 = 25.0 % \\[7.1 %, 59.1 %\\] |" in file.read_text()


def test_markdown_of_others_is_text(hostile):
    text = markdown_report(compare([hostile]))
    assert "<script>" not in text and "<b>" not in text and "\u202e" not in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table and all(line.endswith("|") for line in table)


@pytest.fixture
def hostile(tmp_path):
    answers = {"base": model_answers(8, texts=HOSTILE), "a <b>&\u202e": model_answers(3, texts=HOSTILE, failed=(4,))}
    audit = {"share": 0.5, "expected_share": 0.25, "largest_cosine": 1.0}
    modules = {f"layers.{i}.q_proj": {"norm": 1.0, "sides": {"output": audit}} for i in range(2)}
    report = {"verdict": "inside", "max_share": 1e-5, "dtype": "float32", "largest_shares": {"output": 0.5}}
    report |= {"totals": {"output": audit}, "modules": modules, "not_covered": []}
    return save(tmp_path, answers, title="<script>title</script> $x$", audit=report)


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.text, self.style = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.found and self.found[-1][0] == "style" and not self.style:
            self.style = data
        self.text.append(data)

    def of(self, tag):
        return [attributes for found, attributes in self.found if found == tag]


def test_the_page_runs_nothing_and_loads_nothing(hostile):
    comparison = compare([hostile])
    elements = Elements(page(comparison))
    assert not elements.of("script") and not elements.of("link") and not elements.of("iframe")
    assert len(elements.of("style")) == 1
    for tag, attributes in elements.found:
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
        for name in ("src", "href", "action", "srcset", "data", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    (policy,) = [a["content"] for a in elements.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(elements.style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:;")
    assert "url(" not in elements.style and "@import" not in elements.style
    images = elements.of("img")
    assert len(images) == 4 and all(len(image["alt"]) > 10 for image in images)
    assert {header["scope"] for header in elements.of("th")} == {"col", "row"}
    assert len(elements.of("caption")) == len(elements.of("table"))


def test_the_page_shows_every_text_as_text(hostile):
    content = page(compare([hostile]))
    shown = "".join(Elements(content).text)
    for text in HOSTILE:
        assert visible(text) in shown
    assert shown.count("TimeoutError: <b>no answer</b>") == 2
    assert r"left\u202eright\x1b[31m\x00\x07" in shown
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", content)
    assert "harmful requests" in shown.lower() and "harmful" * 8 in shown and "max_new_tokens" in shown


def test_hidden_characters_are_spelled_out_and_others_are_kept():
    assert visible("a\u200db \U0001f469\u200d\U0001f680 é\tא\n") == "a\u200db \U0001f469\u200d\U0001f680 é\tא\n"
    assert visible("\u202ea\u2066\ufeff\ud800\U000e0041\r") == r"\u202ea\u2066\ufeff\ud800\U000e0041\x0d"


def test_plots_say_what_they_show_and_need_neither_task_nor_categories(two, hostile):
    plots = draw(compare([hostile]).report)
    assert [plot.kind for plot in plots] == ["scatter", "bars", "bars", "heat_map"]
    assert all(plot.png.startswith(b"\x89PNG") for plot in plots)
    assert "harmless requests refused" in plots[0].text and "there is no task set" in plots[0].text
    (scatter, *_) = draw(compare(two).report)
    assert "held-out task loss" in scatter.text and "First/lora: 1.9, 25.0 %" in scatter.text


def test_the_command(two, tmp_path):
    result = run(*two, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["evaluation"] == compare(two).report.model_dump(mode="json")

    out, folder = tmp_path / "new" / "page.html", tmp_path / "plots"
    result = run(*two, "--out", out, "--plots", folder, "--title", "Both")
    assert result.exit_code == 0, result.output
    assert "2/8 = 25.0 %" in result.output and "page.html" in result.output.replace("\n", "")
    assert "<title>Both</title>" in out.read_text()
    names = ["categories-harmful-keyword.png", "categories-harmless-keyword.png", "scatter.png"]
    assert sorted(file.name for file in folder.iterdir()) == names

    before = out.read_bytes()
    for option, value in (("--out", out), ("--plots", folder)):
        result = run(two[0], option, value)
        assert isinstance(result.exception, FileExistsError) and "--overwrite" in str(result.exception)
    assert out.read_bytes() == before
    tables = tmp_path / "tables.md"
    assert isinstance(run(two[0], "--out", tables, "--plots", folder).exception, FileExistsError)
    assert not tables.exists()
    assert run(two[0], "--out", out, "--overwrite").exit_code == 0
    assert "<title>First</title>" in out.read_text()


def test_without_matplotlib_the_tables_are_printed(two, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(two[0]).exit_code == 0
    result = run(two[0], "--out", tmp_path / "page.html")
    assert isinstance(result.exception, ImportError) and "salora-plugins[plot]" in str(result.exception)
    assert "2/8 = 25.0 %" in result.output and not (tmp_path / "page.html").exists()
