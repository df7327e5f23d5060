"""Synthetic chest films with lesion masks and matching reports.

A cartoon of a chest film, made by formulas and seeded draws alone: anatomy (`phantom`), findings
(`lesions`), reports (`language`), and patients and data sets made of them (`dataset`).
"""

from mmclip.data.synthetic.dataset import (
    SyntheticFilm,
    make_patient,
    make_study,
    n_films,
    read_masks,
    write_dataset,
)
from mmclip.data.synthetic.lesions import Lesion
from mmclip.data.synthetic.preset import FINDINGS, PRESETS, Combination, Preset

__all__ = [
    "FINDINGS",
    "PRESETS",
    "Combination",
    "Lesion",
    "Preset",
    "SyntheticFilm",
    "make_patient",
    "make_study",
    "n_films",
    "read_masks",
    "write_dataset",
]
