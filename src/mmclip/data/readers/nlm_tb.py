"""Shenzhen and Montgomery: 662 and 138 images for tuberculosis, that the NLM publishes."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mmclip.data.ages import parse_age, parse_sex
from mmclip.data.ingest.csv_rows import SourceError
from mmclip.data.readers.files import bad_value, paths_below
from mmclip.data.readers.vocabulary import load_words
from mmclip.data.sample import Record, Sample

WHERE = "https://data.lhncbc.nlm.nih.gov/public/Tuberculosis-Chest-X-ray-Datasets/"

_SHENZHEN, _MONTGOMERY = "CHNCXR", "MCUCXR"
_READINGS = "ClinicalReadings"
# "male 45yrs", "Female, 28yrs", "femal 32yrs", "male 16month", "female 64days": then the reading.
_SHENZHEN_FACTS = re.compile(r"\W*([A-Za-z]+)\W*(\d+)\s*([A-Za-z]*)\W*")
# "Patient's Sex: F", "Patient's Age: 027Y", a line each: then the reading.
_MONTGOMERY_FACTS = re.compile(
    r"\W*Patient's Sex:\s*([A-Za-z]*)\s*Patient's Age:\s*(\d*)\s*([A-Za-z]*)\W*", re.IGNORECASE
)


def read_shenzhen(root: Path) -> Iterator[Record]:
    """Shenzhen: one record per image, in the order of their names.

    Citation: Jaeger et al., Quantitative Imaging in Medicine and Surgery 2014, 4(6):475.
    Licence: free use; cite the paper, name the NLM and Shenzhen No. 3 People's Hospital.
    Layout: CXR_png/CHNCXR_0001_0.png to CHNCXR_0662_1.png and ClinicalReadings/CHNCXR_0001_0.txt,
        in the root, in ChinaSet_AllFiles/ or any other folders. Paths with "mask" in them are no
        images.
    Quirks: 0 or 1 at the end of a name is the label: normal, or tuberculosis; nothing else was
        looked for. Radiologists' readings come with the images. A reading is a line of sex and
        age, written in many ways, and a few words ("normal", "bilateral PTB"). They stay in the
        source's labels as they are, and are no report: they name the diagnosis, which is the
        label, half of them are the one word "normal", and a pair of them would count as no
        positive of another equal one. Patients are unknown: each image counts as one. Images are
        PA, as the paper says.

    Args:
        root: The folder that holds all of this.

    Raises:
        SourceError: When there is neither an image nor a reading.
    """
    return _open(root, _SHENZHEN, "shenzhen", _SHENZHEN_FACTS)


def read_montgomery(root: Path) -> Iterator[Record]:
    """Montgomery: one record per image, in the order of their names.

    Citation, licence and quirks: as `read_shenzhen`, of Montgomery County, Maryland.
    Layout: CXR_png/MCUCXR_0001_0.png to MCUCXR_0399_1.png (138 images, with gaps in the numbers)
        and ClinicalReadings/MCUCXR_0001_0.txt, in the root, in MontgomerySet/ or any other
        folders. ManualMask/ holds the masks of the lungs under the images' names: they are not
        read.

    Args:
        root: The folder that holds all of this.

    Raises:
        SourceError: When there is neither an image nor a reading.
    """
    return _open(root, _MONTGOMERY, "montgomery", _MONTGOMERY_FACTS)


def _open(root: Path, prefix: str, source: str, facts: re.Pattern[str]) -> Iterator[Record]:
    listed = partial(_by_name, root, prefix)
    images, readings = listed(".png"), listed(".txt")
    if not images:
        raise SourceError(
            f"{root} and its folders hold no image ({prefix}_0001_0.png); images come from {WHERE}"
        )
    return _records(root, source, facts, images, readings)


def _by_name(root: Path, prefix: str, suffix: str) -> dict[str, str]:
    """Where each file lies, relative to the root, by its name without the suffix."""
    found: dict[str, str] = {}
    for path in paths_below(root, {suffix}):
        name = Path(path).stem
        if name.startswith(f"{prefix}_") and "mask" not in path.lower():
            found.setdefault(name, path)
    return found


def _records(
    root: Path,
    source: str,
    facts: re.Pattern[str],
    images: dict[str, str],
    readings: dict[str, str],
) -> Iterator[Record]:
    words = load_words(source)
    for row, name in enumerate(sorted({*images, *readings})):
        try:
            labels = words.labels([name.rpartition("_")[2]])
        except ValueError as error:
            yield bad_value(row, name, str(error))
            continue
        text = (root / readings[name]).read_text("utf-8-sig", "replace") if name in readings else ""
        said = facts.match(text)
        sex, age, unit = said.groups() if said else ("", "", "")
        reading = " ".join(text[said.end() if said else 0 :].split())
        yield Sample(
            image_id=name,
            study_id=name,
            patient_id=name,
            source=source,
            image=images.get(name, f"CXR_png/{name}.png"),
            view="PA",
            labels=labels,
            label_origin="image-reader",
            source_labels=(reading,) if reading else (),
            age_years=parse_age(age + unit[:1]),
            sex=parse_sex(sex),
        )
