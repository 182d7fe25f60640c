"""The report's page: whole, self-contained, true to fit.json, and honest where a part was refused."""

from __future__ import annotations

import base64
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from data.errors import InputError
from pretrain.study.command_report import report
from pretrain.study.report.fit_file import read_fit
from pretrain.study.report.numbers import count
from pretrain.study.report.page import page
from pretrain.study.report.plots import NoPicture
from pretrain.study.report.plots_frontier import frontier, gap, optima
from pretrain.study.report.plots_isoflop import isoflop_curves
from pretrain.study.report.plots_surface import loss_surface, residuals
from pretrain.study.report.report import ReportOptions, write_report
from tests.pretrain.study import fits

VOID = {"meta", "img", "br"}
APPROACHES = ("parametric", "isoflop", "envelope")


class Page(HTMLParser):
    """A page taken apart: tags that do not close, pictures, addresses, numbers in <data>, tables, text."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.images: list[dict[str, str]] = []
        self.addresses: list[str] = []
        self.numbers: list[tuple[float, str]] = []
        self.tables: list[list[int]] = []
        self.ids: list[str] = []
        self.words = ""
        self._value: list[float] = []
        self._shown = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        assert not [name for name in values if name.startswith("on")]
        if tag == "img":
            self.images.append(values)
        self.addresses += [values[name] for name in ("href", "src", "action", "srcset", "data") if values.get(name)]
        self.ids += [values["id"]] if "id" in values else []
        if tag == "data":
            self._value.append(float(values["value"]))
            self._shown = ""
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append(0)
        if tag in ("th", "td"):
            self.tables[-1][-1] += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()
        if tag == "data":
            self.numbers.append((self._value.pop(), self._shown))

    def handle_data(self, data):
        self._shown += data
        if "style" not in self.open:
            self.words += data


def made(folder, content, **options) -> Page:
    """The page as the command writes it, its pictures drawn."""
    fits.write(folder, content)
    write_report(str(folder / "fit.json"), ReportOptions(**options))
    return Page((folder / "report" / "index.html").read_text())


def told(folder, content, gpu="H800", mfu=0.4) -> Page:
    """The page without its pictures, each of which takes half a second."""
    return Page(page(read_fit(str(fits.write(folder, content))), {}, "no rules", None, gpu, mfu))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, made(folder, fits.fit())


def test_the_page_is_balanced_needs_nothing_from_outside_and_describes_its_pictures(whole):
    folder, page = whole
    text = (folder / "report" / "index.html").read_text()
    assert not page.open
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text.split("</style>")[0])
    outside = [a for a in page.addresses if not a.startswith(("#", "data:image/png;base64,"))]
    assert outside == []
    assert all(a[1:] in page.ids for a in page.addresses if a.startswith("#"))
    assert len(page.images) == 10 == len(list((folder / "report").glob("*.png")))
    inside = {base64.b64decode(image["src"].split(",")[1]) for image in page.images}
    assert inside == {file.read_bytes() for file in (folder / "report").glob("*.png")}
    assert all(len(image["alt"]) > 60 for image in page.images)
    assert "prefers-color-scheme: dark" in text and "@media print" in text


def test_every_figure_is_a_picture_of_its_own_with_colours_and_room_and_nothing_cut_at_the_edge(whole):
    folder, _ = whole
    files = sorted((folder / "report").glob("*.png"))
    assert len({file.read_bytes() for file in files}) == len(files) == 10
    for file in files:
        with Image.open(file) as picture:
            width, height = picture.size
            image = np.asarray(picture.convert("L"))
            assert len(picture.convert("RGB").getcolors(10**6)) > 30, file.name
        assert width >= 1000 and 400 <= height <= 1000
        assert 0.02 < (image == 255).mean() < 0.99, file.name
        assert all(edge.min() > 200 for edge in (image[:2], image[-2:], image[:, :2], image[:, -2:])), file.name


def test_the_alternatives_name_the_numbers(whole):
    folder, found = whole
    fit = read_fit(str(folder / "fit.json"))
    alts = " ".join(image["alt"] for image in found.images)
    for objective in fit.objectives.values():
        for profile in objective.profiles():
            assert (
                f"{count(profile['N_opt']['value'])} parameters at a loss of {profile['loss_opt']['value']:.4g}" in alts
            )
        last = objective.predicted("isoflop")[-1]
        assert f"{objective.name} {last.loss.value:.3g} at {last.C:.2g} FLOPs" in alts
    assert "16 times at 3.6" in alts


def test_every_table_has_as_many_cells_in_each_row_as_in_its_head(whole):
    _, page = whole
    assert len(page.tables) > 10
    assert all(len(set(rows)) == 1 and len(rows) > 1 for rows in page.tables)


def shown_alike(value: float, words: str) -> bool:
    """Whether words such as "84.2 M", "6.4 × 1019" (a power without its tag) or "+0.40 %" are the number, to their last digit."""
    words = words.replace("\N{NO-BREAK SPACE}", " ").replace("+", "")
    if "×" in words or words.startswith("10") and value >= 1e15:
        mantissa, _, power = ("1 × " + words if "×" not in words else words).partition(" × ")
        factor = 10.0 ** float(power[2:])
    else:
        mantissa, _, unit = words.partition(" ")
        factor = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, "%": 0.01}[unit]
    places = len(mantissa.partition(".")[2])
    step = 10.0**-places * factor
    digits = len(mantissa.replace(".", "").replace("-", "").lstrip("0"))
    rough = (
        10.0 ** (len(mantissa.replace("-", "")) - 3) if not places and digits > 3 else 1.0
    )  # 3 digits of a large whole number
    return abs(float(mantissa) * factor - value) <= 0.501 * step * rough


def test_every_number_of_the_fit_is_on_the_page_as_it_is_and_shown_to_its_digits(whole):
    folder, page = whole
    fit = json.loads((folder / "fit.json").read_text())
    values = [value for value, _ in page.numbers]

    def expect(number):
        for key in ("value", "low", "high"):
            assert number[key] in values, number

    for objective in fit["objectives"].values():
        for part in ("parametric", "isoflop", "envelope", "frontier"):
            for number in objective[part].values():
                if isinstance(number, dict):
                    expect(number)
        for budget in objective["isoflop"]["budgets"]:
            for key in ("N_opt", "D_opt", "loss_opt"):
                expect(budget[key])
        for prediction in objective["predictions"]:
            assert prediction["C"] in values
            for key in ("N_opt", "D_opt", "loss"):
                expect(prediction[key])
        assert all(row["loss"] in values for row in objective["rows"])
        assert all(entry["measured"] in values for entry in objective["leave_one_budget_out"]["isoflop"])
    for level in fit["gap"]["at"]:
        expect(level["factor"])
    expect(fit["gap"]["factor"])
    wrong = [(value, words) for value, words in page.numbers if not shown_alike(value, words)]
    assert wrong == []


def test_the_summary_says_what_was_found_with_intervals_and_how_far_it_extrapolates(whole):
    _, page = whole
    words = " ".join(page.words.replace("\N{NO-BREAK SPACE}", " ").split())
    assert "48 cells were fitted (24 masked, 24 autoregressive) at 4 budgets" in words
    assert "1 was left out, with reasons below" in words and "above the unigram entropy" in words
    assert "3 times the largest budget" in words
    assert "masked needs 16 (12 to 20) times the compute of autoregressive" in words
    assert "extrapolated, up to 1.7 times" in words
    assert "One half, size and tokens growing alike, is inside every interval" in words  # masked: 0.499, 0.474 to 0.524
    assert "is outside every interval" in words  # autoregressive: 0.457, 0.434 to 0.480
    assert "convention “6n”" in words and "non-embedding parameters" in words


def test_intervals_that_include_no_effect_are_said_to(tmp_path):
    content = fits.fit()
    content["gap"]["factor"] = {"value": 1.6, "low": 0.7, "high": 3.1}
    masked = content["objectives"]["masked"]
    masked["parametric"]["E"] = {"value": 1.0, "low": 0.0, "high": 2.0}
    masked["isoflop"]["N_exponent"] = {"value": 0.7, "low": 0.65, "high": 0.75}
    words = told(tmp_path, content).words
    assert "The interval includes 1: these cells do not show which of the two needs more." in words
    content["gap"]["seen"] = {"at_least": 4.0, "at_most": None}
    certain = told(tmp_path, content).words
    assert "more than 4 times" in certain and "includes 1" not in certain
    assert words.count("is not pinned down by these cells") == 1
    assert "do not overlap: at least one of them is off here" in words


def test_whatever_comes_from_outside_is_text_on_the_page_and_no_markup_and_no_path(tmp_path):
    evil = '"><script>alert(1)</script>&../../x'
    content = fits.fit()
    masked = content["objectives"].pop("masked")
    masked["rows"][0]["cell"] = evil
    masked["envelope"] = fits.refuse(masked["envelope"], evil)
    content["objectives"] = {evil: masked} | content["objectives"]
    content["input"] |= {"path": evil, "count": evil, "flops": evil, "notes": [evil]}
    content["input"]["excluded"][0] |= {"cell": evil, "objective": evil, "reason": evil}
    content["bootstrap"]["method"] = evil
    content["gap"] |= {"from": evil, "to": evil}
    found = told(tmp_path, content)  # Page refuses a script
    assert not found.open and found.words.count(evil) > 10
    objective = read_fit(str(tmp_path / "fit.json")).objectives[evil]
    assert re.fullmatch(r"residuals-\w+", residuals(objective, evil).name)


@pytest.mark.parametrize(
    "part", ["parametric", "isoflop", "envelope", "frontier", "leave_one_budget_out", "predictions", "gap"]
)
def test_a_refused_part_is_told_as_refused_with_its_reason(tmp_path, part):
    content = fits.fit()
    reason = f"no evidence for {part}: the cells lie on one line"
    place = content if part == "gap" else content["objectives"]["masked"]
    place[part] = {"refused": reason}
    found = told(tmp_path, content)
    assert not found.open and reason in found.words


def test_in_the_place_of_a_figure_that_cannot_be_had_stands_the_reason(tmp_path):
    content = fits.fit()
    masked = content["objectives"]["masked"]
    for part in ("parametric", "isoflop", "frontier"):
        masked[part] = {"refused": f"{part}: cells on one line"}
    masked["predictions"] = content["objectives"]["autoregressive"]["predictions"] = []
    content["gap"] = {"refused": "no loss was reached by both"}
    fit = read_fit(str(fits.write(tmp_path, content)))
    objective = fit.first
    for drawn, reason in (
        (loss_surface(objective, "N"), "parametric: cells on one line"),
        (residuals(objective, "N"), "parametric: cells on one line"),
        (isoflop_curves(objective, "N"), "isoflop: cells on one line"),
        (optima(objective, fit), "isoflop: cells on one line"),
        (frontier(fit), "frontier: cells on one line"),
        (gap(fit), "no loss was reached by both"),
    ):
        assert isinstance(drawn, NoPicture) and reason.partition(": ")[2] in drawn.reason
    assert gap(read_fit(str(fits.write(tmp_path, fits.fit(two=False))))) is None


def test_with_everything_refused_there_is_a_page_without_pictures_and_no_recommended_run(tmp_path):
    content = fits.fit(two=False)
    masked = content["objectives"]["masked"]
    for part in (*APPROACHES, "frontier", "leave_one_budget_out"):
        masked[part] = {"refused": f"{part}: fewer than 3 budgets"}
    masked["predictions"] = []
    found = made(tmp_path, content, study="configs/study_smdm.yaml")
    assert found.images == [] and not found.open
    assert all(f"{part}: fewer than 3 budgets" in found.words for part in (*APPROACHES, "leave_one_budget_out"))
    assert "no optimum of masked could be predicted" in found.words
    assert sorted(file.name for file in (tmp_path / "report").iterdir()) == [".made.json", "index.html"]


def test_a_refused_budget_keeps_the_others_and_a_refused_number_is_not_a_number(tmp_path):
    content = fits.fit(two=False)
    masked = content["objectives"]["masked"]
    first = masked["isoflop"]["budgets"][0]
    falling = "loss still falls towards larger N"
    masked["isoflop"]["budgets"][0] = {"C": first["C"], "points": first["points"], "refused": falling}
    masked["isoflop"]["refused"] = "3 of 4 budgets have a minimum"  # profiles stay where the laws in C are refused
    masked["parametric"]["A"] = {"refused": "A cannot be told from E"}
    masked["frontier"]["E"] = {"value": 2.0, "low": None, "high": math.inf}
    found = told(tmp_path, content)
    assert found.words.count(falling) == 2  # in the summary and in the table of minima
    assert "A cannot be told from E" in found.words
    assert "no lower bound" not in found.words and "inf" not in [words for _, words in found.numbers]
    alt = isoflop_curves(read_fit(str(tmp_path / "fit.json")).first, "N").alt
    assert "4 compute budgets" in alt and alt.count("parameters at a loss of") == 3


def test_without_a_study_beside_it_a_fit_has_no_recommended_run_and_says_why(whole):
    folder, page = whole
    assert "knows no model family" in page.words
    assert not (folder / "report" / "recommended.yaml").exists()


def test_a_second_report_leaves_no_picture_of_the_first_that_it_does_not_have_and_touches_nothing_else(tmp_path):
    content = fits.fit(two=False)
    masked = content["objectives"]["masked"]
    masked["isoflop"] = masked["parametric"] = {"refused": "no"}
    masked["predictions"] = [p for p in masked["predictions"] if p["approach"] == "envelope"]
    made(tmp_path, content)
    mine = tmp_path / "report" / "notes.png"
    mine.write_bytes(b"mine")
    foreign = tmp_path / "report" / "frontier-v2.png"  # named like one of ours, and not ours
    foreign.write_bytes(b"mine")

    def there():
        return {f.name for f in mine.parent.iterdir()} - {".made.json", "index.html"}

    assert there() == {"frontier.png", "optima-masked.png", "notes.png", "frontier-v2.png"}
    (tmp_path / "report" / "optima-masked.png").write_bytes(b"changed by hand")
    masked["predictions"] = []
    made(tmp_path, content)
    assert there() == {"notes.png", "frontier-v2.png", "optima-masked.png"}
    assert mine.read_bytes() == foreign.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("nonsense", "cannot be read as JSON"),
        ("[1, 2]", "no JSON object"),
        ("{}", "is not what `study fit` writes"),
        ('{"input": {}, "objectives": {}}', "holds no objective"),
        ('{"input": {}, "objectives": {"masked": {"rows": []}}}', "rows need N, D, C and loss above 0"),
        ('{"input": {}, "objectives": {"masked": {"rows": [{"N": 1, "D": 1, "C": 6, "loss": NaN}]}}}', "not finite"),
        ('{"input": {}, "objectives": {"masked": {"rows": [{"N": 1, "D": 1, "loss": 3}]}}}', "is not what"),
    ],
)
def test_a_file_that_is_no_fit_is_one_line_and_writes_nothing(tmp_path, content, words):
    (tmp_path / "fit.json").write_text(content)
    with pytest.raises(InputError, match=re.escape(words)) as error:
        write_report(str(tmp_path), ReportOptions())
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["fit.json"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "Z80"], "its peak is not known"),
        (["--mfu", "40"], "--mfu is 40"),
        (["--mfu", "nan"], "mfu.*nan"),
        (["--budget", "-1"], "--budget is -1"),
        (["--budget", "nan"], "budget.*nan"),
        (["--budget", "7e19"], "was not predicted; there are 1e\\+18"),
        (["--study", "nowhere.yaml"], "nowhere.yaml"),
        (["--colour", "red"], "--colour"),
        (["--approach", "guess"], "approach"),
    ],
)
def test_a_wrong_option_is_one_line_and_writes_nothing(tmp_path, arguments, words):
    file = fits.write(tmp_path, fits.fit(two=False))
    with pytest.raises(InputError, match=words) as error:
        report([str(file), *arguments])
    assert "\n" not in str(error.value)
    assert [one.name for one in tmp_path.iterdir()] == ["fit.json"]


def test_a_path_without_a_fit_and_a_folder_that_cannot_be_written_are_one_line(tmp_path):
    with pytest.raises(InputError, match="study fit .* first"):
        report([str(tmp_path)])
    file = fits.write(tmp_path, fits.fit(two=False))
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match="choose another folder with --output"):
        report([str(file), "--output", str(tmp_path / "taken")])


def test_the_gpu_hours_are_the_compute_over_the_peak_at_the_stated_share(tmp_path):
    found = told(tmp_path, fits.fit(two=False), gpu="A100", mfu=0.5)
    hours = 3 * 6.4e19 / (0.5 * 312e12 * 3600)
    assert any(math.isclose(value, hours, rel_tol=1e-12) for value, _ in found.numbers)
    assert "C at 50 % of 312 TFLOP/s" in found.words
