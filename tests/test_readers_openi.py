import io
import random
import re
import tarfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pytest

from mmclip.data.ingest.build import build_data
from mmclip.data.ingest.csv_table import SourceError
from mmclip.data.manifest import read_manifest
from mmclip.data.readers.openi import read_openi
from mmclip.data.sample import Excluded, Reason, Sample
from tests.made_files import encoded, ramp

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "openi"


def report_xml(
    sections: dict[str, str], images: tuple[str, ...] = (), tags: tuple[str, ...] = ()
) -> str:
    """A report as Open-I writes it, with what the reader looks at."""
    texts = "".join(f'<AbstractText Label="{k}">{v}</AbstractText>' for k, v in sections.items())
    mesh = "".join(f"<major>{tag}</major>" for tag in tags)
    samples = "".join(
        f'<parentImage id="{name}"><caption>x</caption></parentImage>' for name in images
    )
    return (
        '<?xml version="1.0" encoding="utf-8"?><eCitation><MedlineCitation><Article><Abstract>'
        f"{texts}</Abstract></Article></MedlineCitation><MeSH>{mesh}</MeSH>{samples}</eCitation>"
    )


CLEAR = {"COMPARISON": "None.", "FINDINGS": "Lungs are clear.", "IMPRESSION": "Normal chest."}


def write_archive(path: Path, documents: dict[str, str | bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, text in documents.items():
            data = text.encode() if isinstance(text, str) else text
            member = tarfile.TarInfo(f"ecgen-radiology/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def read(folder: Path, documents: dict[str, str | bytes]) -> list:
    return list(read_openi(write_archive(folder / "NLMCXR_reports.tgz", documents)))


# Text only.


def test_a_report_without_images_is_one_text_only_record(tmp_path: Path):
    tags = ("Cardiomegaly/mild", " Opacity/lung/base ")
    (sample,) = read(tmp_path, {"7.xml": report_xml(CLEAR, ("CXR7_IM-1-1001",), tags)})
    assert sample == Sample(
        image_id="CXR7",
        study_id="CXR7",
        patient_id="CXR7",
        source="openi",
        findings="Lungs are clear.",
        impression="Normal chest.",
        report="Lungs are clear. Normal chest.",
        source_labels=("Cardiomegaly/mild", "Opacity/lung/base"),
        label_origin="report-reader",
    )


def test_reports_come_by_number_from_archive_folder_or_its_parent(tmp_path: Path):
    documents = {f"{n}.xml": report_xml(CLEAR) for n in (10, 9, 100, 1)}
    archive = write_archive(tmp_path / "NLMCXR_reports.tgz", documents)
    expected = ["CXR1", "CXR9", "CXR10", "CXR100"]
    assert [sample.image_id for sample in read_openi(archive)] == expected
    assert [sample.image_id for sample in read_openi(tmp_path)] == expected
    unpacked = tmp_path / "unpacked" / "ecgen-radiology"
    unpacked.mkdir(parents=True)
    for name, text in documents.items():
        (unpacked / name).write_text(text)
    assert list(read_openi(unpacked.parent)) == list(read_openi(archive))


def test_a_report_without_words_is_excluded_and_says_what_it_has(tmp_path: Path):
    only_other = report_xml({"COMPARISON": "None.", "INDICATION": "Cough.", "FINDINGS": " XXXX. "})
    first, out = read(tmp_path, {"1.xml": report_xml(CLEAR), "2.xml": only_other})
    assert isinstance(first, Sample)
    assert (out.row, out.image_id, out.reason) == (1, "CXR2", Reason.NOTHING_TO_LEARN)
    assert out.detail == (
        "2.xml has neither findings nor an impression, but COMPARISON, INDICATION, FINDINGS"
    )


def test_entities_of_xml_itself_are_read(tmp_path: Path):
    sections = {"FINDINGS": "Nodule &lt;5 mm &amp; &#8220;stable&#8221;.", "IMPRESSION": ""}
    (sample,) = read(tmp_path, {"1.xml": report_xml(sections)})
    assert sample.report == 'Nodule <5 mm & "stable".'


# With images.


def write_images(folder: Path, names: list[str]) -> None:
    (folder / "NLMCXR_png").mkdir()
    for name in names:
        (folder / "NLMCXR_png" / f"{name}.png").write_bytes(encoded(ramp()))


def test_with_the_images_there_is_one_record_an_image(tmp_path: Path):
    names = ("CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001")
    documents = {
        "1.xml": report_xml(CLEAR, names),
        "2.xml": report_xml({}, ("CXR2_IM-0652-1001",)),  # an image without a report
        "3.xml": report_xml(CLEAR),  # a report without an image
        "4.xml": report_xml({}),
    }
    write_archive(tmp_path / "NLMCXR_reports.tgz", documents)
    write_images(tmp_path, [*names, "CXR2_IM-0652-1001"])
    (tmp_path / "indiana_projections.csv").write_text(
        "uid,filename,projection\n1,1_IM-0001-3001.dcm.png,Frontal\n"
        "1,1_IM-0001-4001.dcm.png,Lateral\n2,2_IM-0652-1001.dcm.png,Lateral\n"
    )
    *samples, out = read_openi(tmp_path)
    assert [
        (sample.image_id, sample.study_id, sample.image, sample.view) for sample in samples
    ] == [
        (names[0], "CXR1", f"NLMCXR_png/{names[0]}.png", "unknown"),
        (names[1], "CXR1", f"NLMCXR_png/{names[1]}.png", "L"),
        ("CXR2_IM-0652-1001", "CXR2", "NLMCXR_png/CXR2_IM-0652-1001.png", "L"),
        ("CXR3", "CXR3", None, "unknown"),
    ]
    assert [sample.report is not None for sample in samples] == [True, True, False, True]
    assert (out.row, out.reason) == (4, Reason.NOTHING_TO_LEARN)
    meta = build_data(read_openi(tmp_path), tmp_path, tmp_path / "out", image_size=16)
    assert (meta["n_rows"], meta["n_with_image"], meta["n_paired"]) == (5, 3, 2)


def test_images_that_are_not_there_are_listed(tmp_path: Path):
    names = ("CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001", "../../secret")
    write_archive(tmp_path / "NLMCXR_reports.tgz", {"1.xml": report_xml(CLEAR, names)})
    write_images(tmp_path, [names[0]])
    meta = build_data(read_openi(tmp_path), tmp_path, tmp_path / "out", image_size=16)
    assert meta["n_samples"] == 1
    assert meta["excluded"] == {
        str(Reason.IMAGE_OUTSIDE_ROOT): 1,
        str(Reason.IMAGE_MISSING): 1,
    }


# Hostile or broken documents, beside a sound one.

BOMB = "<!DOCTYPE x [<!ENTITY a 'ha'>" + "".join(
    f"<!ENTITY {chr(98 + i)} '{f'&{chr(97 + i)};' * 10}'>" for i in range(9)
)


@pytest.mark.parametrize(
    ("document", "detail"),
    [
        (BOMB + "]><x>&j;</x>", "document type or entities"),
        ("<!DOCTYPE x SYSTEM 'file:///etc/passwd'><x/>", "document type or entities"),
        ("<!DOCTYPE x [<!ENTITY f SYSTEM 'file:///etc/hostname'>]><x>&f;</x>", "document type"),
        ((BOMB + "]><x>&j;</x>").encode("utf-16"), "utf-8"),
        ("<x>&j;</x>", "no valid XML: undefined entity"),
        (report_xml(CLEAR)[:-20], "no valid XML"),
        ("", "no valid XML"),
        ("FINDINGS: clear", "no valid XML"),
        (report_xml(CLEAR).replace("Lungs", "Lüngs").encode("latin-1"), "utf-8"),
        (report_xml(CLEAR).replace("Lungs", "Lu\0ngs"), "no valid XML"),
        (report_xml({"FINDINGS": "x" * (1 << 20)}), "larger than 1048576 bytes"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_hostile_or_broken_document_is_excluded_and_costs_no_other(tmp_path, document, detail):
    out, sound = read(tmp_path, {"1.xml": document, "2.xml": report_xml(CLEAR)})
    assert isinstance(out, Excluded)
    assert (out.row, out.image_id, out.reason) == (0, "CXR1", Reason.BAD_VALUE)
    assert out.detail.startswith("1.xml: ") and detail in out.detail
    assert "passwd" not in out.detail
    assert sound.report == "Lungs are clear. Normal chest."


def test_a_deeply_nested_document_harms_nothing(tmp_path: Path):
    deep = "<x>" * 100_000 + "</x>" * 100_000
    out, sound = read(tmp_path, {"1.xml": deep, "2.xml": report_xml(CLEAR)})
    assert isinstance(out, Excluded) and isinstance(sound, Sample)


def test_members_that_are_no_files_and_other_files_are_passed_over(tmp_path: Path):
    path = tmp_path / "NLMCXR_reports.tgz"
    with tarfile.open(path, "w:gz") as tar:
        folder = tarfile.TarInfo("ecgen-radiology/3.xml")
        folder.type = tarfile.DIRTYPE
        link = tarfile.TarInfo("ecgen-radiology/4.xml")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(folder)
        tar.addfile(link)
        for name in ("../../5.xml", "notes.txt"):
            member = tarfile.TarInfo(name)
            member.size = len(report_xml(CLEAR))
            tar.addfile(member, io.BytesIO(report_xml(CLEAR).encode()))
    assert [sample.image_id for sample in read_openi(path)] == ["CXR5"]
    assert sorted(item.name for item in tmp_path.iterdir()) == [path.name]


# Broken archives.


def test_a_folder_or_archive_without_reports_is_refused(tmp_path: Path):
    with pytest.raises(SourceError, match=r"neither NLMCXR_reports\.tgz nor ecgen-radiology/"):
        read_openi(tmp_path)
    with pytest.raises(SourceError, match="holds no Open-I reports"):
        read_openi(write_archive(tmp_path / "NLMCXR_reports.tgz", {}))
    (tmp_path / "ecgen-radiology").mkdir()
    with pytest.raises(SourceError, match="holds no Open-I reports"):
        read_openi(tmp_path)


def documents_of_noise(n: int) -> dict[str, str | bytes]:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(400)]
    return {
        f"{i}.xml": report_xml({"FINDINGS": " ".join(rng.choices(words, k=200))}) for i in range(n)
    }


def error_of(archive: Path) -> str | None:
    try:
        read_openi(archive)
    except SourceError as error:
        return str(error)
    return None


@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2", "w"])
def test_a_cut_or_changed_archive_is_one_clear_error(tmp_path: Path, mode: str):
    path = write_archive(tmp_path / "NLMCXR_reports.tgz", documents_of_noise(12), mode)
    content, rng = path.read_bytes(), random.Random(1)
    assert len(list(read_openi(path))) == 12
    n_errors = 0
    for trial in range(60):
        broken = bytearray(content)
        if trial < 10:
            del broken[rng.randrange(len(broken) // 2) :]
        else:
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        message = error_of(path)
        n_errors += message is not None
        if message is None:
            assert trial >= 10, "a cut archive was taken for a whole one"
        else:
            assert re.search("is no whole archive|holds no Open-I", message), message
            assert "\n" not in message
    assert n_errors >= (10 if mode == "w" else 40)


def test_what_is_no_archive_is_refused(tmp_path: Path):
    for content in (b"", b"404 Not Found", encoded(ramp())):
        (tmp_path / "NLMCXR_reports.tgz").write_bytes(content)
        with pytest.raises(SourceError, match="no whole archive"):
            read_openi(tmp_path)


# The real reports.


@pytest.mark.slow
@pytest.mark.skipif(
    not (REAL / "NLMCXR_reports.tgz").is_file(), reason="needs the Open-I report archive"
)
def test_every_real_report_is_kept_or_has_no_words(tmp_path: Path):
    meta = build_data(read_openi(REAL), REAL, tmp_path, image_size=16)
    assert (meta["n_rows"], meta["n_samples"], meta["n_excluded"]) == (3955, 3927, 28)
    assert meta["excluded"] == {str(Reason.NOTHING_TO_LEARN): 28}
    kept = {sample.image_id: sample for sample in read_manifest(tmp_path)}
    n_without, numbers = 0, []
    with tarfile.open(REAL / "NLMCXR_reports.tgz") as tar:
        for member in tar:
            if not member.name.endswith(".xml"):
                continue
            file = tar.extractfile(member)
            assert file is not None
            tree = ET.fromstring(file.read())
            number = int(Path(member.name).stem)
            numbers.append(number)
            said = " ".join(
                part.text or ""
                for part in tree.iter("AbstractText")
                if part.get("Label") in ("FINDINGS", "IMPRESSION")
            )
            words = re.findall(r"[A-Za-z]+", said)
            sample = kept.get(f"CXR{number}")
            if sample is None:
                n_without += 1
                assert not words, number  # the only reason for which a report is left out
            else:
                assert sample.report is not None and len(sample.report) > 2
                assert sample.source_labels == tuple(
                    (tag.text or "").strip() for tag in tree.iter("major")
                )
    assert n_without == 28
    assert [int(name[3:]) for name in kept] == sorted(int(name[3:]) for name in kept)
    assert Counter(sample.split for sample in kept.values()) == {
        "train": 3144,
        "val": 406,
        "test": 377,
    }
