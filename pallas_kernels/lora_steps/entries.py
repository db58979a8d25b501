"""The fields of LoRA entries, which lists are made of and kernels read (see `api.py`)."""

from pallas_kernels.pages import RANK_PAGE

PAGES_A_STEP = 4
RANKS = PAGES_A_STEP * RANK_PAGE  # of a step: as deep as a step of K
PAGE_A, PAGE_B0, PAGE_B1, BEGIN, END, SCALE = range(6)
