"""A report as a supplement: every number is in a CSV, every figure and table has a number and a caption in plain words."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from report_numbers import plain, tables_of, unknown_numbers
from simulated_dynamics import Truth, simulate

from rnndyn_fast.analysis import ReadoutZoneReducer
from rnndyn_fast.analysis.figures import GROUP_COLOURS, NETWORKS, NOT_YET, OTHERS, OWN, STABLE
from rnndyn_fast.report import pdf
from rnndyn_fast.report.analysis_page import analysis_page, report_trajectories, write_report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    truth = Truth(motion="converges", kept=0.7, trait_norm=0.8, state_cosine=0.08)
    write_report(simulate(truth, 400), out, untrained=simulate(Truth(motion="still"), 400), commands=["rnndyn analyse a.h5 --out b"])
    return out


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def test_every_number_is_in_a_csv(page: str, folder: Path) -> None:
    assert unknown_numbers(page, folder) == []
    # The check can fail, in the answer, in a caption and in a cell.
    assert unknown_numbers(page.replace('<div class="answer"><p>', '<div class="answer"><p>0.98765 '), folder) == ["0.98765"]
    assert unknown_numbers(page.replace("<figcaption>", "<figcaption>77.77 ", 1), folder) == ["77.77"]
    cell = re.search(r"<td class=number>([\d.]+)", page)
    assert cell
    assert unknown_numbers(page.replace(cell[0], "<td class=number>4.56", 1), folder)


def test_claims_in_the_report_are_those_of_the_csv(page: str, folder: Path) -> None:
    with (folder / "claims.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["verdict"] == "not supported"
    values = [float(row["value"]) for row in rows]
    found = []
    for number in (1, 2):
        with (folder / f"table_{number}.csv").open(newline="", encoding="utf-8") as file:
            found += [float(row["value (95% interval), value"]) for row in csv.DictReader(file)]
    assert found == values
    text = plain(page)
    for row in rows:
        assert row["reason"] in text.replace(row["reason"].capitalize(), row["reason"])


def test_trajectories_at_hand_may_bring_their_control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rnndyn_fast.report.analysis_page.write_figures", lambda *_, **__: [])  # takes most of the time
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 40)
    r, before = (np.eye(3)[label] * 4 + np.cumsum(rng.normal(size=(6, 40, 3)), axis=0) * 0.3 for _ in range(2))
    report_trajectories(r, np.eye(3), label, tmp_path, untrained=before)
    text = (tmp_path / "claims.csv").read_text()
    assert "change_untrained" in text
    assert "was not given" not in text


def test_sums_alone_decide_nothing() -> None:
    reducer = ReadoutZoneReducer(np.eye(3), timesteps=4)
    reducer.update(np.random.default_rng(0).normal(size=(4, 50, 3)), np.zeros(50, int))
    text = plain(analysis_page(reducer.result()).html())
    assert "Inconclusive: the result holds sums only" in text
    assert "--keep-samples" in text


def test_head_says_question_answer_and_n(page: str) -> None:
    head = plain(page[: page.index("<nav")])
    assert head.index("n = 1 network") < head.index("Do representations") < head.index("not supported (") < head.index("Figure 1.")
    assert page.count('class="answer"') == 1
    assert page[page.index('<div class="answer">') : page.index("</div>")].count("<p>") == 2


def test_figures_and_tables_are_numbered_and_speak_plainly(page: str) -> None:
    for kind in ("Figure", "Table"):
        numbers = [int(number) for number in re.findall(rf"<b>{kind} (\d+)\.</b>", page)]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) >= 5
    captions = re.findall(r'<figcaption>(.*?)</figcaption>|<p class="caption">(.*?)</p>', page, re.DOTALL)
    shown = [plain(a or b) for a, b in captions] + [cell for table in tables_of(page).values() for cell in table[0]]
    shown += [plain(text) for text in re.findall(r"<text[^>]*>(.*?)</text>", page, re.DOTALL)]
    assert [text for text in shown if re.search(r"\w_\w|`|\bt_stable\b", text)] == []


def test_axes_have_labels(folder: Path) -> None:
    """Every figure file but the confusion's and classes' (whose axes are classes) names both of its axes."""
    for path in folder.glob("*.svg"):
        texts = re.findall(r"<text[^>]*>(.*?)</text>", path.read_text(encoding="utf-8"), re.DOTALL)
        words = [text for text in texts if re.search(r"[a-z]{3}", text)]
        assert len(words) >= 2, path.name


def test_a_colour_means_one_thing() -> None:
    meanings = {STABLE: "stable", NOT_YET: "not yet", OWN: "own", OTHERS: "others"}
    assert len(meanings) == 4
    assert GROUP_COLOURS["stable_correct"] == STABLE
    others = [*list(GROUP_COLOURS.values())[1:], *(colour for colour, _ in NETWORKS)]
    assert len({*others, *meanings}) == len(others) + 4


def test_provenance_methods_and_references_can_be_pasted(page: str) -> None:
    start = page.index('<section id="provenance')
    section = plain(page[start : page.index("</section>", start)])
    for wanted in ("date", "commit", "versions", "hardware", "seed of the bootstrap", "rnndyn analyse a.h5 --out b", "@inproceedings{",
                   "@article{holm", "Holm's method", "Satterthwaite"):  # fmt: skip
        assert wanted in section, wanted
    assert section.count("{") == section.count("}")
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", section)


def test_same_scale_for_what_is_compared(page: str) -> None:
    """Trained and untrained change: their axes end at the same number."""
    figures = re.findall(r'<figure class="plot">(.*?)</figure>', page, re.DOTALL)
    both = [figure for figure in figures if "change of the representation per time step, one line" in figure.lower()]
    assert len(both) == 2
    ticks = [re.findall(r"<text[^>]*>(-?[\d.]+)</text>", figure) for figure in both]
    assert max(map(float, ticks[0])) == max(map(float, ticks[1]))


def test_pdf_needs_a_browser_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf.shutil, "which", lambda _: None)
    with pytest.raises(ImportError, match="pdf: expected a browser that prints"):
        write_report(simulate(Truth(), 40), tmp_path / "out", pdf=True)
    assert not (tmp_path / "out").exists()


def test_pdf_is_printed(folder: Path) -> None:
    from browser import CHROMIUM

    if CHROMIUM is None:
        pytest.skip("no chromium (apt-get install chromium)")
    path = pdf.print_pdf(folder / "report.html")
    assert path.read_bytes()[:5] == b"%PDF-"
    assert path.stat().st_size > 50_000
