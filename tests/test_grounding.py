import json
import os
from collections import Counter
from pathlib import Path

import pytest

from mmclip.data.ingest.csv_table import SourceError
from mmclip.data.readers.files import Box
from mmclip.data.readers.grounding import read_chestxdet10_boxes, read_mscxr_boxes
from tests.published import lay_out

IMAGE = "0a0a0a0a-1111-2222-3333-444444444444"
PATH = f"files/p10/p10000032/s50414267/{IMAGE}.jpg"
COCO = {
    "info": {},
    "images": [
        {"id": 1, "file_name": f"{IMAGE}.jpg", "width": 2544, "height": 3056, "path": PATH},
        {"id": 2, "file_name": "no-box.jpg", "width": 2544, "height": 3056, "path": PATH},
    ],
    "categories": [{"id": 5, "name": "Pleural Effusion"}, {"id": 8, "name": "Lung Opacity"}],
    "annotations": [
        {
            "id": 9,
            "image_id": 1,
            "category_id": 5,
            "bbox": [10.0, 20.0, 300.0, 40.0],
            "label_text": "small left  pleural effusion",
            "area": 12000,
        },
        {
            "id": 10,
            "image_id": 1,
            "category_id": 8,
            "bbox": [1, 2, 3, 4],
            "label_text": "patchy opacities, bilateral",
        },
    ],
}
CSV = (
    "dicom_id,category_name,label_text,path,x,y,w,h,image_width,image_height,split\n"
    f"{IMAGE},Pleural Effusion,small left pleural effusion,{PATH},10,20,300,40,2544,3056,test\n"
    f'{IMAGE},Lung Opacity,"patchy opacities, bilateral",{PATH},1,2,3,4,2544,3056,train\n'
)
BOXES = [
    Box(IMAGE, "pleural effusion", 10.0, 20.0, 300.0, 40.0, "small left pleural effusion"),
    Box(IMAGE, "lung opacity", 1.0, 2.0, 3.0, 4.0, "patchy opacities, bilateral"),
]


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0"])
@pytest.mark.parametrize(("kind", "text"), [("json", json.dumps(COCO)), ("csv", CSV)])
def test_both_forms_of_mscxr_give_the_same_boxes(
    tmp_path: Path, version: str, kind: str, text: str
):
    lay_out(tmp_path, {f"MS_CXR_Local_Alignment_v{version}.{kind}": text})
    assert list(read_mscxr_boxes(tmp_path)) == BOXES


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no MS_CXR_Local_Alignment_v1.1.0.json or"),
        ({"json": "{}"}, "is no COCO file of MS-CXR .*'images'.*; download it again"),
        ({"json": json.dumps({**COCO, "categories": []})}, "is no COCO file .*5"),
        ({"csv": CSV.replace("300", "wide")}, f"{IMAGE}: could not convert .* 'wide'"),
        ({"csv": CSV.replace("Pleural Effusion", "Gout")}, f"{IMAGE}: the label 'Gout'"),
    ],
)
def test_a_damaged_file_of_mscxr_is_one_line(tmp_path: Path, files: dict, message: str):
    lay_out(tmp_path, {f"MS_CXR_Local_Alignment_v1.1.0.{kind}": t for kind, t in files.items()})
    with pytest.raises(SourceError, match=message):
        list(read_mscxr_boxes(tmp_path))


DET10 = [
    {"file_name": "36203.png", "syms": [], "boxes": []},
    {
        "file_name": "36204.png",
        "syms": ["Nodule", "Effusion"],
        "boxes": [[233, 666, 258, 693], [0, 1, 10, 21]],
    },
]


def test_corners_become_sides_and_an_image_without_a_finding_has_no_box(tmp_path: Path):
    lay_out(tmp_path, {"train.json": json.dumps(DET10), "test.json": "[]"})
    assert list(read_chestxdet10_boxes(tmp_path, "train")) == [
        Box("36204.png", "nodule", 233.0, 666.0, 25.0, 27.0),
        Box("36204.png", "pleural effusion", 0.0, 1.0, 10.0, 20.0),
    ]
    assert list(read_chestxdet10_boxes(tmp_path, "test")) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{]", "JSONDecodeError"),
        ('[{"file_name": "1.png", "syms": ["Nodule"], "boxes": []}]', "ValueError"),
        ('[{"file_name": "1.png", "syms": ["Gout"], "boxes": [[1, 2, 3, 4]]}]', "label 'Gout'"),
        ('[{"file_name": "1.png", "syms": ["Mass"], "boxes": [[1, 2, 3]]}]', "ValueError"),
    ],
)
def test_a_damaged_file_of_chestxdet10_is_one_line(tmp_path: Path, text: str, message: str):
    with pytest.raises(SourceError, match=f"{message}.*; download it again"):
        list(read_chestxdet10_boxes(lay_out(tmp_path, {"test.json": text}), "test"))


def test_every_box_of_the_real_files_is_read():
    folder = Path(os.environ.get("MMCLIP_CHESTXDET10", ""))
    if not (folder / "train.json").is_file():
        pytest.skip("needs ChestX-Det10-Dataset of GitHub; name it by MMCLIP_CHESTXDET10")
    train, test = (list(read_chestxdet10_boxes(folder, split)) for split in ("train", "test"))
    assert (len(train), len(test)) == (6_863, 1_476)
    assert Counter(box.finding for box in test)["pneumothorax"] == 42
    assert all(0 < box.width_px < 1024 and 0 < box.height_px < 1024 for box in train + test)
    assert not {box.image_id for box in train} & {box.image_id for box in test}
