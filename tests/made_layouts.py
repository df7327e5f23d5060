"""Small data sets in the layouts of public ones, with known labels: what protocols are tried on.

Each function lays out the images of a plan as the data set comes, by path under its folder. What
stands for an image's findings in the source's own words is written here by hand or by the word list
of the package, which the tests of the readers hold to the real tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmclip.data.readers.vocabulary import load_words
from mmclip.data.sample import Split
from tests import test_readers_chestxray14 as chestxray14
from tests import test_readers_chexpert as chexpert
from tests import test_readers_openi as openi
from tests import test_readers_padchest as padchest
from tests.made_files import dicom, encoded

Files = dict[str, bytes | str]


@dataclass(frozen=True)
class Planned:
    """One image: where it goes, if the source says so, and what is known of it."""

    number: int
    split: Split
    present: tuple[str, ...]  # findings; all others that the source looks for are absent
    is_open: bool = False  # nothing is known of what is not present
    is_lateral: bool = False

    def pixels(self) -> np.ndarray:
        """uint8 [24, 32], of its own: equal images would be one patient's."""
        return np.random.default_rng(self.number).integers(0, 256, (24, 32), dtype=np.uint8)

    def png(self) -> bytes:
        return encoded(self.pixels())

    def dicom(self) -> bytes:
        return dicom(self.pixels(), ViewPosition="AP", PatientAge="063Y", PatientSex="F")


def lines(*rows: Sequence[object]) -> str:
    """Rows of a CSV."""
    return "".join(",".join(map(str, row)) + "\n" for row in rows)


def word_of(source: str, finding: str) -> str:
    """A label word of a source for a finding: that of its own name, if there is one."""
    named = {
        word: meaning.present
        for word, meaning in load_words(source).words.items()
        if finding in meaning.present
    }
    return min(named, key=lambda word: (word.lower() != finding, named[word] != (finding,), word))


def of_chestxray14(samples: Sequence[Planned], with_lists: bool = True) -> Files:
    """Two images a patient."""
    rows = [chestxray14.HEADER]
    for sample in samples:
        said = "|".join(word_of("chestxray14", f) for f in sample.present) or "No Finding"
        facts = f"0,{sample.number // 2},0{30 + sample.number % 50}Y,F,PA,2500,2048,0.168,0.168"
        rows.append(f"{sample.number:08}_000.png,{said},{facts}")
    test = [f"{sample.number:08}_000.png\n" for sample in samples if sample.split == "test"]
    train = [f"{sample.number:08}_000.png\n" for sample in samples if sample.split != "test"]
    lists = {"test_list.txt": "".join(test), "train_val_list.txt": "".join(train)}
    return {
        chestxray14.TABLE: "\n".join(rows) + "\n",
        **(lists if with_lists else {}),
        **{f"images_001/images/{sample.number:08}_000.png": sample.png() for sample in samples},
    }


def of_chexpert(samples: Sequence[Planned]) -> Files:
    """Train labels mined from reports, with all values; test images with labels alone."""
    columns = chexpert.FINDINGS.split(",")
    tables: dict[Split, list[str]] = {
        "train": [chexpert.HEADER.strip()],
        "val": [chexpert.HEADER.strip()],
        "test": [f"Path,{chexpert.FINDINGS}"],
    }
    folder: dict[Split, str] = {"train": "train", "val": "valid", "test": "test"}
    files: Files = {}
    for sample in samples:
        side = "lateral" if sample.is_lateral else "frontal"
        path = f"{folder[sample.split]}/patient{sample.number:05}/study1/view1_{side}.jpg"
        files[path] = encoded(sample.pixels(), "JPEG")
        absent = "" if sample.is_open else "0.0"
        values = ["1.0" if name.lower() in sample.present else absent for name in columns]
        facts = [] if sample.split == "test" else ["Female", "60", side.capitalize(), "PA"]
        tables[sample.split].append(",".join([path, *facts, *values]))
    names: dict[Split, str] = {"train": "train.csv", "val": "valid.csv", "test": "test_labels.csv"}
    return {**files, **{names[part]: "\n".join(rows) + "\n" for part, rows in tables.items()}}


def of_covidx(samples: Sequence[Planned]) -> Files:
    """Lists of two classes, as of CXR-4."""
    files: Files = {f"{sample.split}/{sample.number}.png": sample.png() for sample in samples}
    for part in ("train", "val", "test"):
        rows = (
            f"{sample.number} {sample.number}.png {'positive' if sample.present else 'negative'} "
            f"bimcv\n"
            for sample in samples
            if sample.split == part
        )
        files[f"{part}.txt"] = "".join(rows)
    return files


def of_shenzhen(samples: Sequence[Planned]) -> Files:
    files: Files = {}
    for sample in samples:
        name = f"CHNCXR_{sample.number:04}_{int(bool(sample.present))}"
        files[f"CXR_png/{name}.png"] = sample.png()
        files[f"ClinicalReadings/{name}.txt"] = f"male {20 + sample.number}yrs\nnormal\n"
    return files


def of_montgomery(samples: Sequence[Planned]) -> Files:
    files: Files = {}
    for sample in samples:
        name = f"MontgomerySet/CXR_png/MCUCXR_{sample.number:04}_{int(bool(sample.present))}.png"
        files[name] = sample.png()
    return files


OPENI_TAGS = {
    "lung opacity": "Opacity/lung/base/left",
    "cardiomegaly": "Cardiomegaly/mild",
    "atelectasis": "Pulmonary Atelectasis/base",
    "calcified granuloma": "Calcified Granuloma/lung",
    "pleural effusion": "Pleural Effusion/left/small",
    "atherosclerosis": "Atherosclerosis/aorta",
    "catheter": "Catheters, Indwelling/right",
    "airspace disease": "Airspace Disease/lung",
    "nodule": "Nodule/lung/lingula",
    "scoliosis": "Scoliosis/thoracic vertebrae/mild",
    "bone fracture": "Fractures, Bone/ribs",
    "emphysema": "Pulmonary Emphysema",
}
"""Tags as the real reports have them, with qualifiers."""


def of_openi(samples: Sequence[Planned]) -> Files:
    """XML reports, unpacked, and the images; views from Kaggle's table."""
    views = ["uid,filename,projection"]
    files: Files = {}
    for sample in samples:
        tags = tuple(OPENI_TAGS[f] for f in sample.present)
        tags += ("No Indexing",) if sample.is_open else () if tags else ("normal",)
        name = f"CXR{sample.number}_IM-0001-1001"
        report = openi.report_xml(openi.CLEAR, (name,), tags)
        files[f"ecgen-radiology/{sample.number}.xml"] = report
        side = "Lateral" if sample.is_lateral else "Frontal"
        views.append(f"{sample.number},{sample.number}_IM-0001-1001.dcm.png,{side}")
        files[f"NLMCXR_png/{name}.png"] = sample.png()
    return {**files, "indiana_projections.csv": "\n".join(views) + "\n"}


def of_padchest(samples: Sequence[Planned]) -> Files:
    """Images for test are labelled by physicians, the others by the network."""
    words = load_words("padchest").words

    def said_of(sample: Planned) -> list[str]:
        named = [f if f in words else word_of("padchest", f) for f in sample.present]
        return [*named, *(["unchanged"] if sample.is_open else [])] or ["kyphosis"]

    rows, files = [], dict[str, bytes | str]()
    for sample in samples:
        rows.append(
            {
                "ImageID": f"{sample.number}.png",
                "PatientID": f"p{sample.number}",
                "StudyID": f"s{sample.number}",
                "Projection": "L" if sample.is_lateral else "PA",
                "MethodLabel": "Physician" if sample.split == "test" else "RNN_model",
                "Labels": str(said_of(sample)).replace('"', "'"),
            }
        )
        files[f"0/{sample.number}.png"] = encoded(sample.pixels().astype(np.uint16) * 100)
    return {**files, padchest.TABLE: padchest.table(*rows)}


def of_rsna(samples: Sequence[Planned]) -> Files:
    """Images with a pneumonia have two boxes, so two rows."""
    labels, classes = ["patientId,x,y,width,height,Target"], ["patientId,class"]
    files: Files = {}
    for sample in samples:
        name = f"f{sample.number}"
        files[f"stage_2_train_images/{name}.dcm"] = sample.dicom()
        if sample.present:
            labels += [f"{name},1,2,3,4,1", f"{name},5,6,3,4,1"]
            classes += [f"{name},Lung Opacity"] * 2
        else:
            labels.append(f"{name},,,,,0")
            classes.append(
                f"{name},{('Normal', 'No Lung Opacity / Not Normal')[sample.number % 2]}"
            )
    tables = {
        "stage_2_train_labels.csv": labels,
        "stage_2_detailed_class_info.csv": classes,
    }
    return {**files, **{name: "\n".join(rows) + "\n" for name, rows in tables.items()}}


def of_siim(samples: Sequence[Planned]) -> Files:
    """An image with a pneumothorax has two masks, so two rows."""
    rows = ["ImageId,EncodedPixels"]
    for sample in samples:
        name = f"1.2.826.{sample.number}"
        rows += [f"{name},2 3 1020 2", f"{name},5000 1"] if sample.present else [f"{name},-1"]
    files: Files = {
        f"stage_2_images/1.2.826.{sample.number}.dcm": sample.dicom() for sample in samples
    }
    return {"stage_2_train.csv": "\n".join(rows) + "\n", **files}


SIIM_MAPPING = """\
table = "siim.csv"

[columns]
image_id = "image_id"
image = "image"
patient_id = "image_id"
source = "source"
labels = "labels"

[labels]
origin = "image-reader"
map = { "0" = { absent = ["pneumothorax"] }, "1" = { present = ["pneumothorax"] } }
"""


def of_siim_reupload(samples: Sequence[Planned]) -> Files:
    """Kaggle's re-upload as PNG, as BenchX names its images, in a table for reader csv."""
    rows = [
        (
            f"{sample.number}_train",
            f"png/{sample.number}_train.png",
            "siim",
            int(bool(sample.present)),
        )
        for sample in samples
    ]
    return {
        "siim.csv": lines(("image_id", "image", "source", "labels"), *rows),
        "mapping.toml": SIIM_MAPPING,
        **{f"png/{sample.number}_train.png": sample.png() for sample in samples},
    }


def of_vindr(samples: Sequence[Planned]) -> Files:
    """PhysioNet's tables: train by three radiologists, test by consensus, all 28 labels."""
    words = load_words("vindr")
    columns = {words.finding(name): name for name in words.words if name != "Other diseases"}
    rows: dict[bool, list[Sequence[object]]] = {
        True: [("image_id", *columns.values())],
        False: [("image_id", "rad_id", *columns.values())],
    }
    files: Files = {}
    for sample in samples:
        is_test = sample.split == "test"
        files[f"{sample.split}/f{sample.number}.dicom"] = sample.dicom()
        values = [int(finding in sample.present) for finding in columns]
        if is_test:
            rows[True].append((f"f{sample.number}", *values))
            continue
        for reader in ("R1", "R2", "R3"):
            # One of three names it all: what readers do not agree on is not known.
            named = [1] * len(values) if sample.is_open and reader == "R1" else values
            rows[False].append((f"f{sample.number}", reader, *named))
    return {
        "annotations/image_labels_train.csv": lines(*rows[False]),
        "annotations/image_labels_test.csv": lines(*rows[True]),
        **files,
    }
