"""Synthetic chest films with lesion masks and matching reports.

A cartoon of a chest film, made by formulas and seeded draws alone. In the order of making: knobs
(`preset`), healthy anatomy (`phantom`), findings (`lesions`), the film (`film`), its report
(`language`), a patient (`patient`) and a folder of them (`dataset`).
"""

from mmclip.data.synthetic.dataset import holds_preset, read_masks, write_dataset
from mmclip.data.synthetic.lesions import Lesion
from mmclip.data.synthetic.patient import SyntheticFilm, make_patient, make_study, n_films
from mmclip.data.synthetic.preset import FINDINGS, PRESETS, Combination, Preset

__all__ = [
    "FINDINGS",
    "PRESETS",
    "Combination",
    "Lesion",
    "Preset",
    "SyntheticFilm",
    "holds_preset",
    "make_patient",
    "make_study",
    "n_films",
    "read_masks",
    "write_dataset",
]
