"""Two copies of Open-I that many have: Kaggle's tables, and the annotation file of R2Gen."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from mmclip.data.ingest.csv_rows import SourceError, read_rows
from mmclip.data.readers.files import (
    bad_value,
    find_table,
    index_images,
    paths_below,
    read_sound_rows,
)
from mmclip.data.sample import Excluded, Reason, Record, Sample, Split, View
from mmclip.data.text import Report, make_report

WHERE_KAGGLE = "https://www.kaggle.com/datasets/raddar/chest-xrays-indiana-university"
WHERE_R2GEN = "https://github.com/zhjohnchan/R2Gen"

_REPORTS, _PROJECTIONS = "indiana_reports.csv", "indiana_projections.csv"
_REPORT_COLUMNS = ("uid", "MeSH", "findings", "impression")
_ANNOTATIONS = ("annotation.json", "iu_xray_annotation.json")
_VIEWS: dict[str, View] = {"Lateral": "L", "Frontal": "unknown"}  # PA or AP, which is not said
_SPLITS: dict[str, Split] = {"train": "train", "val": "val", "test": "test"}


def read_openi_kaggle(root: Path) -> Iterator[Record]:
    """Kaggle's copy of Open-I: one record per image, in the order of indiana_projections.csv.

    Citation: Demner-Fushman et al., JAMIA 2016, 23(2):304.
    Licence: CC BY-NC-ND 4.0.
    Layout: indiana_reports.csv (3,851 reports) and indiana_projections.csv (7,466 images); images
        as images/images_normalized/1_IM-0001-4001.dcm.png, or in any other folders. Without any
        image there is one text-only record a report.
    Quirks: 104 reports fewer than Open-I has. Frontal images are PA or AP, which
        is not said. MeSH tags stay in the source's labels, as with `read_openi`. No patient ids
        are published: a study counts as a patient, and patients can be in two splits. A study's
        number is that of Open-I, "CXR1".

    Args:
        root: The folder that holds all of this.

    Raises:
        SourceError: When a table is missing or damaged.
    """
    reports = find_table(root, (_REPORTS,), WHERE_KAGGLE)
    images = _images_or_none(root)
    if not images:
        return _kaggle_texts(reports)
    return _kaggle_images(find_table(root, (_PROJECTIONS,), WHERE_KAGGLE), _by_uid(reports), images)


def _images_or_none(root: Path) -> dict[str, str]:
    """Where the images lie, by name without the suffix; empty where there is none."""
    if not any(paths_below(root, {".png"})):
        return {}
    return index_images(root, {".png"}, WHERE_KAGGLE)


def _by_uid(table: Path) -> dict[str, dict[str, str]]:
    return {cells["uid"]: cells for cells in read_sound_rows(table, _REPORT_COLUMNS)}


def _kaggle_images(
    table: Path, reports: Mapping[str, Mapping[str, str]], images: Mapping[str, str]
) -> Iterator[Record]:
    for row, (cells, problem) in enumerate(read_rows(table, ("uid", "filename", "projection"))):
        name = cells.get("filename", "").removesuffix(".png").removesuffix(".dcm")
        if not problem and cells["projection"] not in _VIEWS:
            problem = f"projection is {cells['projection']!r}, not {' or '.join(_VIEWS)}"
        if not problem and cells["uid"] not in reports:
            problem = f"uid {cells['uid']!r} is not in {_REPORTS}"
        if problem:
            yield bad_value(row, f"CXR{name}", problem)
            continue
        report = reports[cells["uid"]]
        file = cells["filename"]
        yield _image(
            f"CXR{name}",
            f"CXR{cells['uid']}",
            make_report(report["findings"], report["impression"]),
            image=images.get(Path(file).stem, f"images/images_normalized/{file}"),
            view=_VIEWS[cells["projection"]],
            tags=_tags(report),
        )


def _kaggle_texts(table: Path) -> Iterator[Record]:
    for row, (cells, problem) in enumerate(read_rows(table, _REPORT_COLUMNS)):
        study = f"CXR{cells.get('uid', '')}"
        if problem:
            yield bad_value(row, study, problem)
            continue
        report = make_report(cells["findings"], cells["impression"])
        if report.text is None:
            detail = "neither findings nor an impression"
            reason = Reason.NOTHING_TO_LEARN
            yield Excluded(row=row, image_id=study, reason=reason, detail=detail)
            continue
        yield _image(study, study, report, tags=_tags(cells))


def _tags(cells: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(tag for word in cells["MeSH"].split(";") if (tag := word.strip()))


def _image(
    image_id: str,
    study_id: str,
    report: Report,
    *,
    split: Split | None = None,
    image: str | None = None,
    view: View = "unknown",
    tags: tuple[str, ...] = (),
) -> Sample:
    return Sample(
        image_id=image_id,
        study_id=study_id,
        patient_id=study_id,
        source="openi",
        split=split,
        image=image,
        view=view,
        findings=report.findings,
        impression=report.impression,
        report=report.text,
        source_labels=tags,
        label_origin="report-reader" if tags else None,
    )


def read_openi_r2gen(root: Path) -> Iterator[Record]:
    """IU X-ray as R2Gen deals it: one record per image, in the order of the annotation file.

    Citation: Demner-Fushman et al., JAMIA 2016, 23(2):304; splits: Chen et al., R2Gen, EMNLP 2020
        (arXiv:2010.16056).
    Licence: CC BY-NC-ND 4.0.
    Layout: annotation.json or iu_xray_annotation.json (2,955 studies of two images each); images as
        images/CXR2384_IM-0942/0.png. Without any image there is one text-only record a study.
    Quirks: Only studies with findings and two images. A report is the findings alone. In a copy
        that goes round, the third key is four blanks and not "test": the split is that of each
        study's own field. 99 of the 2,262 different reports are in several splits: normal images
        are described in equal words. Which image is the lateral one is not said. A study counts
        as a patient; its number is that of Open-I, "CXR2384".

    Args:
        root: The folder that holds all of this.

    Raises:
        SourceError: When the file is missing or damaged.
    """
    path = find_table(root, _ANNOTATIONS, WHERE_R2GEN)
    try:
        annotations = json.loads(path.read_text("utf-8-sig"))
        studies = [study for dealt in annotations.values() for study in dealt]
    except (ValueError, TypeError, AttributeError) as error:
        raise SourceError(f"{path} is no annotation file ({error}); download it again") from None
    has_images = any(paths_below(root, {".png"}))
    return _r2gen_records(studies, has_images)


def _r2gen_records(studies: list, has_images: bool) -> Iterator[Record]:
    row = 0
    for study in studies:
        name = str(study.get("id", "")) if isinstance(study, dict) else ""
        try:
            split = _SPLITS[study["split"]]
            report = make_report(study["report"], None)
            paths = [str(path) for path in study["image_path"]] if has_images else [""]
        except (LookupError, TypeError, AttributeError) as error:
            yield bad_value(row, name, f"no study of R2Gen: {type(error).__name__} {error}")
            row += 1
            continue
        study_id = name.partition("_")[0]
        for path in paths:
            image = f"images/{path}" if path else None
            image_id = path.removesuffix(".png") or study_id
            yield _image(image_id, study_id, report, split=split, image=image)
            row += 1
