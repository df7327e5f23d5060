"""Synthetic chest X-rays with lesion masks and matching reports.

A cartoon of a chest X-ray, made by formulas and seeded draws alone. In the order of making: knobs
(`preset`), healthy anatomy (`phantom`), findings (`lesions`), the image (`image`), its report
(`language`), a patient (`patient`) and a folder of them (`dataset`).
"""

from mmclip.data.synthetic.dataset import holds_preset, read_masks, write_dataset
from mmclip.data.synthetic.lesions import Lesion
from mmclip.data.synthetic.patient import SyntheticSample, make_patient, make_study, n_images
from mmclip.data.synthetic.preset import FINDINGS, PRESETS, Combination, Preset

__all__ = [
    "FINDINGS",
    "PRESETS",
    "Combination",
    "Lesion",
    "Preset",
    "SyntheticSample",
    "holds_preset",
    "make_patient",
    "make_study",
    "n_images",
    "read_masks",
    "write_dataset",
]
