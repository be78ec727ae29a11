"""The report's content as records, in the order of report.json, which only this module writes and reads.

A record's fields bear the names of the file. Qualities are in percent, losses in points of percent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from storage.errors import UserError

HEADLINE = {"panoptic": ("sPQ", "uPQ", "hPQ"), "semantic": ("sIoU", "uIoU", "hIoU")}
CHECKPOINTS = "inductive", "transductive"
PAPER_ROWS = *CHECKPOINTS, "control", "ceiling", "true_classes", *(f"true_masks_{name}" for name in CHECKPOINTS)
# With the teacher at prediction, behind the paper's own rows: each checkpoint with it, and the teacher alone.
WITH_TEACHER = "inductive_teacher", "transductive_teacher"
TEACHER_ROWS = *WITH_TEACHER, "teacher"
ROWS = *PAPER_ROWS, *TEACHER_ROWS


@dataclass(frozen=True, kw_only=True)
class PanopticClass:
    """One class in one row: its qualities, and how many segments match (tp), are spurious (fp) or missed (fn)."""

    id: int
    name: str
    isthing: bool
    seen: bool
    PQ: float
    SQ: float
    RQ: float
    IoU: float
    tp: int
    fp: int
    fn: int


@dataclass(frozen=True, kw_only=True)
class SemanticClass:
    """One class in one row of a semantic benchmark: its IoU, and its pixels in the ground truth."""

    id: int
    name: str
    seen: bool
    IoU: float
    pixels: int


@dataclass(frozen=True, kw_only=True)
class PanopticScores:
    """One row of a panoptic benchmark: class means over the seen (s) and unseen (u) classes, their harmonic means (h).

    PQ, SQ, RQ, PQ_th (things) and PQ_st (stuff) leave absent classes out, as panopticapi does. In sPQ, uPQ, sIoU and
    uIoU they count 0; `absent_seen` and `absent_unseen` count the classes without any segment that counts.
    """

    sPQ: float
    uPQ: float
    hPQ: float
    sIoU: float
    uIoU: float
    hIoU: float
    PQ: float
    SQ: float
    RQ: float
    PQ_th: float
    PQ_st: float
    absent_seen: int
    absent_unseen: int
    per_class: Sequence[PanopticClass]


@dataclass(frozen=True, kw_only=True)
class SemanticScores:
    """One row of a semantic benchmark.

    mIoU leaves out classes that neither occur nor are predicted. In sIoU and uIoU they count 0; `absent_seen` and
    `absent_unseen` count them. `accuracy` is the share of pixels whose class is right.
    """

    mIoU: float
    sIoU: float
    uIoU: float
    hIoU: float
    accuracy: float
    absent_seen: int
    absent_unseen: int
    per_class: Sequence[SemanticClass]


Scores = PanopticScores | SemanticScores


@dataclass(frozen=True, kw_only=True)
class SeenUnseen:
    """Mean PQ of the seen and of the unseen classes, or a difference of two."""

    sPQ: float
    uPQ: float


@dataclass(frozen=True, kw_only=True)
class NamedRight:
    """Of the true segments with a query, how many there are, and the percentage of them whose class is right: among the
    seen or the unseen classes alone (`within_group`), and among all (`over_all`)."""

    segments: int
    within_group: float
    over_all: float


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Where one checkpoint's panoptic quality is lost, see `Waterfall`.

    `levels`: "truth", which is 100, and what is left after each of `waterfall.LOSSES`. `losses`: by their names, the
    differences of neighbouring levels. `named_right`: of the "seen" and the "unseen" segments.
    """

    levels: Mapping[str, SeenUnseen]
    losses: Mapping[str, SeenUnseen]
    named_right: Mapping[str, NamedRight]


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """Panoptic quality with a setting at `value`."""

    value: float
    sPQ: float
    uPQ: float
    hPQ: float


@dataclass(frozen=True, kw_only=True)
class SweepCurves:
    """One checkpoint's points over each setting, in ascending order."""

    object_threshold: Sequence[SweepPoint]
    seen_offset: Sequence[SweepPoint]


@dataclass(frozen=True, kw_only=True)
class TeacherCurves:
    """One checkpoint's points with the teacher at prediction, over the exponent of the seen classes (`alpha`) and of
    the unseen ones (`beta`), the other at its setting and the object threshold the row's, in ascending order."""

    alpha: Sequence[SweepPoint]
    beta: Sequence[SweepPoint]


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """Both checkpoints' curves, on the first `images` of the `of` validation images."""

    images: int
    of: int
    inductive: SweepCurves
    transductive: SweepCurves
    inductive_teacher: TeacherCurves
    transductive_teacher: TeacherCurves


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Ground-truth segments that the ceilings and losses leave out: crowds, and those that no query lies over (they
    count as lost masks); where there are any, those too small for a token, which the teacher's ceiling misses."""

    crowd_segments: int
    segments_without_a_query: int
    segments_without_a_token: int | None = None

    def content(self) -> dict[str, int]:
        return {name.replace("_", " "): count for name, count in asdict(self).items() if count is not None}


@dataclass(frozen=True, kw_only=True)
class TeacherAccuracy:
    """Percentage of the ground-truth instances that the teacher's own tokens classify right, all class names to choose
    from: of the seen and of the unseen classes."""

    instances: int
    seen: float
    unseen: float


@dataclass(frozen=True, kw_only=True)
class Published:
    """The paper's table and our rows in its columns, see `beside_the_paper`; a row has a number, or None, a column."""

    table: str
    columns: Sequence[str]
    published: Mapping[str, Sequence[float]]
    ours: Mapping[str, Sequence[float | None]]
    note: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the scores were made with; of a semantic benchmark, whose maps have no thresholds, these are None.

    The rows with the teacher at prediction have object thresholds of their own, chosen like the other one, and the
    exponents `alpha` and `beta`; the teacher alone is at 1 and 1.
    """

    object_threshold: float | None = None
    object_threshold_chosen_on: str | None = None
    object_threshold_inductive_teacher: float | None = None
    object_threshold_transductive_teacher: float | None = None
    object_threshold_teacher: float | None = None
    overlap_threshold: float | None = None
    seen_offset: float
    control_offset: float
    alpha: float
    beta: float
    images: int
    teacher: str

    def content(self) -> dict[str, Any]:
        """Name -> value of those that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Built:
    """An artefact that the report was made from, as "kind/key", and the seconds that it took to build."""

    ref: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """All of a report.

    Attributes:
        benchmark: its name.
        marks: warnings to read before any number.
        rows: the scores of each of `ROWS`.
        losses: by checkpoint and by row with the teacher; None of a semantic benchmark.
        sweeps: diagnostic curves; None of a semantic benchmark.
        left_out: see `LeftOut`.
        teacher_accuracy: see `TeacherAccuracy`.
        published: the paper's numbers; None where the paper has none of this benchmark.
        settings: see `Settings`.
        preset: the run it was published for; None in the artefact, which serves every run with its inputs.
        lineage: stage -> what was built, of a published report.
    """

    benchmark: str
    marks: Sequence[str]
    rows: Mapping[str, Scores]
    losses: Mapping[str, Losses] | None
    sweeps: SweepReport | None
    left_out: LeftOut
    teacher_accuracy: TeacherAccuracy
    published: Published | None
    settings: Settings
    preset: str | None = None
    lineage: Mapping[str, Built] | None = None

    def to_json(self) -> str:
        """The file's text. Raises ValueError for a number that is not finite."""
        content: dict[str, Any] = {"benchmark": self.benchmark, "marks": self.marks}
        content |= {name: asdict(row) for name, row in self.rows.items()}
        if self.losses is not None:
            content["losses"] = {name: asdict(part) for name, part in self.losses.items()}
        if self.sweeps is not None:
            content["sweeps"] = asdict(self.sweeps)
        content["left_out"] = self.left_out.content()
        content["teacher_accuracy"] = asdict(self.teacher_accuracy)
        content["published"] = None if self.published is None else asdict(self.published)
        content["settings"] = self.settings.content()
        if self.preset is not None:
            content["preset"] = self.preset
        if self.lineage is not None:
            content["lineage"] = {stage: asdict(made) for stage, made in self.lineage.items()}
        return json.dumps(content, indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Report:
        """The inverse of `to_json`. Raises ValueError, KeyError, TypeError or AttributeError for any other text."""
        content = json.loads(text)
        losses, sweeps, published, lineage = (
            content.get(name) for name in ("losses", "sweeps", "published", "lineage")
        )
        return Report(
            benchmark=content["benchmark"],
            marks=content["marks"],
            rows={name: _scores(content[name]) for name in ROWS},
            losses=losses and {name: _losses(losses[name]) for name in (*CHECKPOINTS, *TEACHER_ROWS)},
            sweeps=sweeps and _sweeps(sweeps),
            left_out=LeftOut(**{name.replace(" ", "_"): count for name, count in content["left_out"].items()}),
            teacher_accuracy=TeacherAccuracy(**content["teacher_accuracy"]),
            published=published and Published(**published),
            settings=Settings(**content["settings"]),
            preset=content.get("preset"),
            lineage=lineage and {stage: Built(**made) for stage, made in lineage.items()},
        )


def read_report(path: Path) -> Report:
    """The report in a file report.json. Raises UserError, naming the file, when it is missing or is not such a file."""
    try:
        return Report.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is missing or no report ({reason}); `zs-seg run` writes it again") from error


def _scores(row: dict[str, Any]) -> Scores:
    rest: dict[str, Any] = {name: value for name, value in row.items() if name != "per_class"}
    if "PQ" in row:
        return PanopticScores(**rest, per_class=[PanopticClass(**part) for part in row["per_class"]])
    return SemanticScores(**rest, per_class=[SemanticClass(**part) for part in row["per_class"]])


def _losses(part: dict[str, Any]) -> Losses:
    return Losses(
        levels={name: SeenUnseen(**level) for name, level in part["levels"].items()},
        losses={name: SeenUnseen(**loss) for name, loss in part["losses"].items()},
        named_right={group: NamedRight(**right) for group, right in part["named_right"].items()},
    )


def _sweeps(part: dict[str, Any]) -> SweepReport:
    def curves(name: str) -> dict[str, list[SweepPoint]]:
        return {setting: [SweepPoint(**point) for point in points] for setting, points in part[name].items()}

    return SweepReport(
        images=part["images"],
        of=part["of"],
        inductive=SweepCurves(**curves("inductive")),
        transductive=SweepCurves(**curves("transductive")),
        inductive_teacher=TeacherCurves(**curves("inductive_teacher")),
        transductive_teacher=TeacherCurves(**curves("transductive_teacher")),
    )
